"""BEiT v2 and VQ-KD transcribed from the papers and from a description of the authors' code, in plain torch.

Nothing here comes from this project or from transformers. The weights have the names and shapes of the released files
(fused qkv, separate q and v biases) and random values.
Shapes: B images, N patches, D width, A heads, M masked patches, K codes, E width of a code, F width of the teacher.
"""

import math

import torch
from torch.nn import functional as F

WIDTH, HEADS, PATCH, SIDE, CODES, CODE_SIZE, FEATURES = 32, 2, 16, 4, 24, 8, 12
PIXELS = PATCH * SIDE


def drawn(name: str, *shape: int, std: float = 0.3) -> torch.Tensor:
    """The same random numbers for a name at each call."""
    seed = sum(ord(letter) * (position + 1) for position, letter in enumerate(name))
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vit_weights(prefix: str, blocks: str, num_blocks: int, scales: bool) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for block in (f"{prefix}{blocks}.{number}." for number in range(num_blocks)):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.weight": (WIDTH,), f"{block}{norm}.bias": (WIDTH,)}
        shapes |= {f"{block}attn.qkv.weight": (3 * WIDTH, WIDTH)}
        shapes |= {f"{block}attn.{letter}_bias": (WIDTH,) for letter in "qv"}
        for linear, size in (("attn.proj", (WIDTH, WIDTH)), ("mlp.fc1", (64, WIDTH)), ("mlp.fc2", (WIDTH, 64))):
            shapes |= {f"{block}{linear}.weight": size, f"{block}{linear}.bias": size[:1]}
        if scales:
            shapes |= {f"{block}gamma_{number}": (WIDTH,) for number in (1, 2)}
    return {name: drawn(name, *shape) for name, shape in shapes.items()}


def beit2_weights(num_blocks: int = 4) -> dict[str, torch.Tensor]:
    """As in `beitv2_base_patch16_224_pt1k.pth`."""
    table = ((2 * SIDE - 1) ** 2 + 3, HEADS)
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "mask_token": (1, 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "rel_pos_bias.relative_position_bias_table": table,
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "lm_head.weight": (CODES, WIDTH),
        "lm_head.bias": (CODES,),
    }
    state = {name: drawn(name, *shape) for name, shape in shapes.items()}
    state |= vit_weights("", "blocks", num_blocks, scales=True) | vit_weights("", "cls_pt_layers", 2, scales=True)
    return state


def vqkd_weights() -> dict[str, torch.Tensor]:
    """As in `vqkd_encoder_base_decoder_3x768x12_clip.pth`, with small weights of a teacher, which is in it too."""
    state: dict[str, torch.Tensor] = {}
    for name, channels, patch, num_blocks in (("encoder.", 3, PATCH, 2), ("decoder.", CODE_SIZE, 1, 3)):
        shapes = {
            "cls_token": (1, 1, WIDTH),
            "pos_embed": (1, 1 + SIDE**2, WIDTH),
            "patch_embed.proj.weight": (WIDTH, channels, patch, patch),
            "patch_embed.proj.bias": (WIDTH,),
            "fc_norm.weight": (WIDTH,),
            "fc_norm.bias": (WIDTH,),
        }
        state |= {name + key: drawn(name + key, *shape) for key, shape in shapes.items()}
        state |= vit_weights(name, "blocks", num_blocks, scales=False)
    for name, size in (("encode_task_layer", CODE_SIZE), ("decode_task_layer", FEATURES)):
        for number, outputs in ((0, WIDTH), (2, size)):
            state |= {f"{name}.{number}.weight": drawn(f"{name}{number}", outputs, WIDTH)}
            state |= {f"{name}.{number}.bias": drawn(f"{name}{number}b", outputs)}
    codes = F.normalize(drawn("codes", CODES, CODE_SIZE), dim=1)
    counts = drawn("counts", CODES).abs()
    return state | {
        "quantize.embedding.weight": codes,
        "quantize.embedding.cluster_size": counts,
        "quantize.embedding.embed_avg": codes.clone(),
        "quantize.embedding.initted": torch.ones(1),
        "quantize.cluster_size": counts.clone(),
        "teacher_model.proj": drawn("teacher", 4, 4),
        "scaling_layer.scale": torch.ones(1, 3, 1, 1),
    }


def position_bias(table: torch.Tensor) -> torch.Tensor:
    """(A, 1+N, 1+N): 49 offsets, then class to patch, patch to class, class to class."""
    rows = torch.full((1 + SIDE**2, 1 + SIDE**2), len(table) - 1)
    for query in range(SIDE**2):
        for key in range(SIDE**2):
            down, right = query // SIDE - key // SIDE, query % SIDE - key % SIDE
            rows[1 + query, 1 + key] = (down + SIDE - 1) * (2 * SIDE - 1) + right + SIDE - 1
    rows[0, 1:], rows[1:, 0] = len(table) - 3, len(table) - 2
    return table[rows].permute(2, 0, 1)


def norm(state, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def block(state, name: str, x: torch.Tensor, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
    q_bias, v_bias = state[f"{name}.attn.q_bias"], state[f"{name}.attn.v_bias"]
    qkv_bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    qkv = F.linear(norm(state, f"{name}.norm1", x), state[f"{name}.attn.qkv.weight"], qkv_bias)
    q, k, v = qkv.unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
    attention = (q * (WIDTH // HEADS) ** -0.5 @ k.transpose(-2, -1) + bias).softmax(-1)
    y = (attention @ v).transpose(1, 2).flatten(2)
    y = F.linear(y, state[f"{name}.attn.proj.weight"], state[f"{name}.attn.proj.bias"])
    x = x + state.get(f"{name}.gamma_1", 1.0) * y
    y = F.linear(norm(state, f"{name}.norm2", x), state[f"{name}.mlp.fc1.weight"], state[f"{name}.mlp.fc1.bias"])
    y = F.linear(F.gelu(y), state[f"{name}.mlp.fc2.weight"], state[f"{name}.mlp.fc2.bias"])
    return x + state.get(f"{name}.gamma_2", 1.0) * y


def embed(state, prefix: str, x: torch.Tensor) -> torch.Tensor:
    weight = state[f"{prefix}patch_embed.proj.weight"]
    return F.conv2d(x, weight, state[f"{prefix}patch_embed.proj.bias"], stride=weight.shape[-1]).flatten(2).mT


def with_class_token(state, prefix: str, patches: torch.Tensor) -> torch.Tensor:
    return torch.cat([state[f"{prefix}cls_token"].expand(len(patches), 1, WIDTH), patches], 1)


def num_blocks(state, prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))


def beit2_losses(state, pixels, mask, labels, early: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropies of both heads at the masked patches of standardized images; Sec. 2.3 and 2.4."""
    patches, hidden = embed(state, "", pixels), mask[..., None].to(pixels.dtype)
    x = with_class_token(state, "", patches * (1 - hidden) + state["mask_token"] * hidden)
    bias = position_bias(state["rel_pos_bias.relative_position_bias_table"])
    for number in range(num_blocks(state, "blocks.")):
        x = block(state, f"blocks.{number}", x, bias)
        if number + 1 == early:
            early_patches = x[:, 1:]
    y = torch.cat([x[:, :1], early_patches], 1)
    for number in range(num_blocks(state, "cls_pt_layers.")):
        y = block(state, f"cls_pt_layers.{number}", y, bias)
    losses = []
    for tokens in (x, y):
        logits = F.linear(norm(state, "norm", tokens)[:, 1:][mask], state["lm_head.weight"], state["lm_head.bias"])
        losses.append(F.cross_entropy(logits, labels[mask]))
    return losses[0], losses[1]


def tokens_of_vit(state, prefix: str, x: torch.Tensor) -> torch.Tensor:
    x = with_class_token(state, prefix, embed(state, prefix, x)) + state[f"{prefix}pos_embed"]
    for number in range(num_blocks(state, f"{prefix}blocks.")):
        x = block(state, f"{prefix}blocks.{number}", x)
    return norm(state, f"{prefix}fc_norm", x[:, 1:])


def task_layer(state, name: str, x: torch.Tensor) -> torch.Tensor:
    hidden = F.linear(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"]).tanh()
    return F.linear(hidden, state[f"{name}.2.weight"], state[f"{name}.2.bias"])


def vqkd(state, pixels: torch.Tensor, teacher: torch.Tensor) -> dict[str, torch.Tensor]:
    """One forward pass on images in [0, 1] and the features (B, N, F) of a teacher; Sec. 2.2."""
    z = task_layer(state, "encode_task_layer", tokens_of_vit(state, "encoder.", pixels * 255 / 127.5 - 1))
    z = z / z.norm(dim=-1, keepdim=True)  # (B, N, E)
    table = state["quantize.embedding.weight"]
    codes = ((z[:, :, None] - table) ** 2).sum(-1).argmin(-1)  # (B, N)
    chosen = table[codes]
    straight_through = z + (chosen - z).detach()
    features = tokens_of_vit(state, "decoder.", straight_through.mT.reshape(len(z), CODE_SIZE, SIDE, SIDE))
    features = task_layer(state, "decode_task_layer", features)
    cosine = (features * teacher).sum(-1) / (features.norm(dim=-1) * teacher.norm(dim=-1))
    loss = (1 - cosine).mean() + ((chosen.detach() - z) ** 2).mean()
    return {"codes": codes, "z": z.detach(), "features": features, "loss": loss}


def moved_codebook(table, counts, z, codes, decay: float = 0.99) -> tuple[torch.Tensor, torch.Tensor]:
    """Table and counts after a step, code by code."""
    new_table, new_counts = table.clone(), counts.clone()
    for code in range(len(table)):
        members = z[codes == code]
        new_counts[code] = decay * counts[code] + (1 - decay) * len(members)
        target = table[code] if not len(members) else members.sum(0) / len(members)
        moved = decay * table[code] + (1 - decay) * target / math.sqrt((target**2).sum())
        new_table[code] = moved / math.sqrt((moved**2).sum())
    return new_table, new_counts
