"""The papers that a model card names."""

from typing import NamedTuple


class Paper(NamedTuple):
    title: str
    authors: str
    year: int
    arxiv: str

    def bibtex(self, key: str) -> str:
        return (
            f"@article{{{key}{self.year},\n  title   = {{{{{self.title}}}}},\n  author  = {{{self.authors}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}},\n  year    = {{{self.year}}}\n}}"
        )


PAPERS = {
    "mae": Paper(
        "Masked Autoencoders Are Scalable Vision Learners",
        "Kaiming He and Xinlei Chen and Saining Xie and Yanghao Li and Piotr Doll{\\'a}r and Ross Girshick",
        2021,
        "2111.06377",
    ),
    "simmim": Paper(
        "SimMIM: A Simple Framework for Masked Image Modeling",
        "Zhenda Xie and Zheng Zhang and Yue Cao and Yutong Lin and Jianmin Bao and Zhuliang Yao and Qi Dai and Han Hu",
        2021,
        "2111.09886",
    ),
    "beit": Paper(
        "BEiT: BERT Pre-Training of Image Transformers",
        "Hangbo Bao and Li Dong and Songhao Piao and Furu Wei",
        2021,
        "2106.08254",
    ),
}
