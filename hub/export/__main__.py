"""Export a trained model: `python -m hub.export DIR --onnx FILE | --timm FILE | --decoder FOLDER`."""

import argparse
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from hub.export.decoder import export_decoder
from hub.export.native import PRETRAINING
from hub.export.onnx import export_onnx
from hub.export.timm import export_timm


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hub.export", description="Export a trained model.")
    parser.add_argument("folder", help="output folder of run_pretraining.py, run_finetune.py or hub.convert")
    parser.add_argument("--onnx", metavar="FILE", help="write the encoder or classifier for onnxruntime")
    parser.add_argument("--timm", metavar="FILE", help="write it as safetensors under timm's names")
    parser.add_argument("--decoder", metavar="FOLDER", help="write all but the encoder as safetensors, with a README")
    options = parser.parse_args(arguments)
    folder = Path(options.folder)
    if not (options.onnx or options.timm or options.decoder):
        parser.error("nothing to write: add --onnx, --timm or --decoder")
    try:
        if (options.onnx or options.timm) and not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no model for AutoModel: config.json is missing")
        if options.onnx:
            print("\n".join(export_onnx(folder, options.onnx)))
        if options.timm:
            print("\n".join(export_timm(folder, options.timm)))
        if options.decoder:
            print("\n".join(export_decoder(folder / PRETRAINING, options.decoder)))
    except ValueError as error:
        sys.exit(f"hub.export: {error}")


if __name__ == "__main__":
    disable_progress_bar()
    main()
