"""What cards say of the data sets and bases that the recipes know: where they come from, and under which terms.

Terms are those that the paper's appendix D and the data sets' own pages give, in short; they are no legal advice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from smear_peft.cards.runs import IMAGES, MINILM, TEXT, Run, hub_id

RESEARCH_USE = "research-use"


@dataclass(frozen=True)
class DataSet:
    """A data set, in words.

    Attributes:
        name: what people call it.
        type: what the model-index calls it.
        hub: its id on the Hub, if that is where it was read, or where its rows come from.
        terms: under which it may be used.
        licence: the adapter's that follows: of the Hub's list, or research-use where the data allow no more.
        labels: of its classes, in order, where they are few.
        classes: how many there are, if they are not listed.
        limits: what to know before reading a figure.
        language: of its texts.
    """

    name: str
    type: str
    terms: str
    hub: str | None = None
    licence: str = RESEARCH_USE
    labels: tuple[str, ...] = ()
    classes: int | None = None
    limits: tuple[str, ...] = ()
    language: str | None = None

    @property
    def outputs(self) -> int | None:
        """Classes, if known."""
        return len(self.labels) or self.classes


GLUE = DataSet(
    name="GLUE",
    type="nyu-mll/glue",
    hub="nyu-mll/glue",
    language="en",
    terms="CoLA, SST-2, RTE, MRPC, STS-B and QQP allow non-commercial research; QNLI is under CC BY-SA 4.0; MultiNLI's "
    "sources have licences of their own (the paper's appendix D).",
)
LOCAL_GLUE = replace(
    GLUE,
    limits=(
        "The rows are those of a local copy, which need not be all of GLUE's nor in its splits (counts above): the "
        "figures are not to be compared with others on GLUE.",
    ),
)
TINY_GLUE = DataSet(
    name="a few dozen sentences",
    type="tiny-glue",
    language="en",
    licence="apache-2.0",
    terms="The sentences were written for trying the recipe out and come with it, under Apache-2.0.",
    limits=("The data are a few dozen sentences written for trying the recipe out: the scores mean nothing.",),
)
IMAGE_SETS = {
    "digits": DataSet(
        name="digits in six domains",
        type="digits",
        licence="apache-2.0",
        labels=tuple("0123456789"),
        terms="Scikit-learn's handwritten digits are the test part of *Optical Recognition of Handwritten Digits* by "
        "E. Alpaydin and C. Kaynak (UCI, doi:10.24432/C50P49), CC BY 4.0; the six renderings are the recipe's.",
        limits=(
            "Each digit appears once in each domain, in one split: the domains are renderings of the same digits.",
            "The demo's base, a ResNet18 trained on the plain digits alone, was chosen among three by the test "
            "accuracy of both of the demo's adapters.",
        ),
    ),
    "pacs": DataSet(
        name="PACS",
        type="pacs",
        labels=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
        terms="PACS (Li et al., ICCV 2017) has no explicit licence; it was published for research, with images from "
        "Caltech256, Sketchy, TU-Berlin and Google Images.",
        limits=(
            "The splits are our own, not the kfold files of the authors of PACS, and the images were scaled to 96 "
            "pixels: the figures are not to be compared with published ones.",
            "Sketches of the same photograph by several people may be in training and in test, as in PACS itself.",
        ),
    ),
    "domainnet": DataSet(
        name="DomainNet",
        type="wltjr1007/DomainNet",
        hub="wltjr1007/DomainNet",
        classes=345,
        terms="DomainNet allows non-commercial research (the paper's appendix D).",
    ),
}
BASES = {
    "resnet18_photo_base": "The base is our own stand-in, **not ImageNet's ResNet18**: its stem and its first three "
    "layers have ImageNet's weights (batch norm folded in), the rest was trained on 970 photographs of PACS. It is "
    "good at photographs, and its weights derive from ImageNet (non-commercial research).",
    "MiniLM": "The base is sentence-transformers/all-MiniLM-L6-v2, which its makers trained to compare sentences, with "
    "texts of MultiNLI, Quora's questions and SQuAD among many others (its card on the Hub): mnli, qqp and qnli are "
    "not new to it.",
    "a T5 with random weights": "The base has random weights: the scores show that the machinery turns, and are not to "
    "be compared with the paper's.",
}
BASE_TERMS = {
    IMAGES: "The ResNet of the paper is under the BSD 3-clause licence (its appendix D).",
    TEXT: "T5 is under Apache-2.0.",
    MINILM: "MiniLM (all-MiniLM-L6-v2) is under Apache-2.0.",
}
CODE_TERMS = "The adapter's code, smear_peft, is under Apache-2.0."


def terms_of(run: Run) -> str:
    """Of data, base and code."""
    base = MINILM if run.config["base"] == MINILM else run.kind
    known = [BASE_TERMS[base]] if base in BASE_TERMS and run.base_on_hub() else []
    return " ".join([data_set_of(run).terms, *known, CODE_TERMS])


def data_set_of(run: Run) -> DataSet:
    """The data set of a run; one that is not known is called by its folder's name."""
    name = str(run.config["dataset"])
    if run.kind != IMAGES:
        return TINY_GLUE if name == "tiny" else GLUE if hub_id(name) else LOCAL_GLUE
    last = Path(name).name.lower()
    terms = f"The terms of {last} are not known to the recipe: see where it is from."
    return IMAGE_SETS.get(last) or DataSet(name=last, type=last, terms=terms, licence="unknown")
