"""Search by binary codes of four bytes: semantic hashing of the documentation that comes with Python.

Documents are the docstrings of Python's standard library, as weights of their words (TF-IDF). An autoencoder whose
codes are made noisy before a tanh learns to push them to both ends, so that their signs are what they tell:
Salakhutdinov and Hinton, Semantic hashing, 2009. Held-out docstrings are the queries; a document found is right if it
is of the query's module. The baseline is the signs of as many principal components, the reference an exact search by
the cosine of all words.

    python examples/retrieval.py --out runs/retrieval

prints the share of right documents among the first k, and draws it and what some queries find into OUT/retrieval.png.
Takes half a minute.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aefast.functional as AF
from aefast.nn import MLP
from aefast.train import CapturedStep, make_optimizer

BATCH = 128
HELD_OUT = 0.25
LEAST_WORDS = 8  # of a document
LEAST_DOCUMENTS = 40  # of a module
WORDS = 2000
DROPPED = 0.5  # share of a document's words that the encoder is not shown
NOISE = 0.7  # deviation of the noise in a code
COUNTS = (1, 2, 5, 10, 20, 50, 100)
SHOWN, FOUND = 4, 3  # queries in the figure, and documents that each method finds for one


class Hashing(nn.Module):
    """Words (B, words) to codes (B, bits), whose signs are the bits, and back to the logits of words."""

    def __init__(self, words: int, bits: int) -> None:
        super().__init__()
        self.encoder = MLP((words, 256, bits))
        self.decoder = MLP((bits, 256, words))

    def loss(self, words: Tensor) -> Tensor:
        """The cross-entropy of the words that a noisy code lets expect, to the shares that words have."""
        code = self.encoder(AF.corrupt(words, "dropout", p=DROPPED))
        logits = self.decoder(AF.corrupt(code, "gaussian", std=NOISE).tanh())
        return F.cross_entropy(logits, words / words.sum(1, keepdim=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval"), help="folder of the figure")
    parser.add_argument("--epochs", type=int, default=40, help="at least 1")
    parser.add_argument("--bits", type=int, default=32, help="of a code")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, order and which documents are held out"
    )
    arguments = parser.parse_args()
    # Model and batches are so small that waking a second thread costs more than it brings.
    torch.set_num_threads(1)

    texts, modules = documents()
    words = weights_of_words(texts)
    # A document of none of the words tells nothing.
    kept = words.any(1).nonzero()[:, 0]
    order = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(arguments.seed))]
    queries, stored = order[: round(HELD_OUT * len(order))], order[round(HELD_OUT * len(order)) :]
    names = sorted(set(modules))
    labels = torch.tensor([names.index(module) for module in modules])
    print(f"{len(stored):,} documents of {len(names)} modules, {len(queries):,} queries")

    bits = {
        "autoencoder": learnt_codes(arguments, words, stored).sign(),
        "PCA": principal_codes(arguments, words, stored).sign(),
    }
    size = -(-arguments.bits // 8)
    searches = {
        f"autoencoder, {arguments.bits} bits": (bits["autoencoder"], size),
        f"PCA, {arguments.bits} bits": (bits["PCA"], size),
        "exact, cosine": (words, words.shape[1] * words.element_size()),
    }
    found, precisions = {}, {}
    for name, (vectors, size) in searches.items():
        found[name] = stored[ranked(vectors[queries], vectors[stored])]
        precisions[name] = precision(labels[found[name]], labels[queries])
        told = " · ".join(f"@{k} {precisions[name][k]:6.1%}" for k in (1, 10, 100))
        print(f"{name:22} precision {told} · {size:,} bytes a document")

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "retrieval.png"
    draw(precisions, found, queries, texts, modules, path)
    print(f"figure: {path}")


def documents() -> tuple[list[str], list[str]]:
    """The docstrings of the standard library, each once, and the top-level module or package each is of."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text.split()) >= LEAST_WORDS:
                    # _pydecimal and its like hold the Python versions of public modules.
                    found.setdefault(text, parts[0].removesuffix(".py").removeprefix("_py").lstrip("_"))
    sizes = Counter(found.values())
    kept = [(text, module) for text, module in found.items() if sizes[module] >= LEAST_DOCUMENTS]
    texts, modules = zip(*kept, strict=True)
    return list(texts), list(modules)


def weights_of_words(texts: list[str]) -> Tensor:
    """(N, words): rows of length 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    counted = TfidfVectorizer(
        max_features=WORDS, stop_words="english", sublinear_tf=True, token_pattern="[A-Za-z]{3,}"
    )
    return torch.from_numpy(counted.fit_transform(texts).toarray()).float()


def learnt_codes(arguments: argparse.Namespace, words: Tensor, stored: Tensor) -> Tensor:
    """(N, bits), of a model that was trained on the stored documents."""
    torch.manual_seed(arguments.seed)
    model = Hashing(words.shape[1], arguments.bits)
    step = CapturedStep(model, make_optimizer(model.parameters(), 3e-3), loss=Hashing.loss)
    for _ in range(arguments.epochs):
        for rows in stored[torch.randperm(len(stored))].split(BATCH):
            step(words[rows])
    with torch.no_grad():
        return model.encoder(words)


def principal_codes(arguments: argparse.Namespace, words: Tensor, stored: Tensor) -> Tensor:
    """(N, bits): the first principal components of the stored documents, of mean 0 over them."""
    from sklearn.decomposition import PCA

    model = PCA(arguments.bits, random_state=arguments.seed).fit(words[stored].numpy())
    return torch.from_numpy(model.transform(words.numpy())).float()


def ranked(queries: Tensor, stored: Tensor) -> Tensor:
    """(Q, max(COUNTS)): the stored vectors nearest to each query, all vectors being of one length.

    Products of signs fall as their Hamming distance grows; of equals the first comes first.
    """
    return (queries @ stored.T).argsort(dim=1, descending=True, stable=True)[:, : max(COUNTS)]


def precision(found: Tensor, wanted: Tensor) -> dict[int, float]:
    """By k, the share of the first k labels found (Q, max(COUNTS)) that are those wanted (Q,)."""
    is_right = (found == wanted[:, None]).double()
    return {k: is_right[:, :k].mean().item() for k in COUNTS}


def draw(
    precisions: dict[str, dict[int, float]],
    found: dict[str, Tensor],
    queries: Tensor,
    texts: list[str],
    modules: list[str],
    path: Path,
) -> None:
    """The precision over k, and beside it queries of different modules with what each search finds for them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    colours = dict(zip(precisions, ("#d94801", "#2171b5", "#969696"), strict=True))
    figure = pyplot.figure(figsize=(13, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.9))
    axis = left.subplots()
    for name, at in precisions.items():
        axis.plot(list(at), list(at.values()), marker="o", markersize=4, color=colours[name], label=name)
    axis.set_xscale("log")
    axis.set_xticks(COUNTS, list(map(str, COUNTS)))
    axis.minorticks_off()
    axis.set_ylim(0, 1)
    axis.set_xlabel("k")
    axis.set_ylabel("share of the first k found that are of the query's module")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)

    axis = right.subplots()
    axis.set_axis_off()
    axis.set_title(
        "queries that the exact search answers well, and what each search finds first (green: of the query's module)",
        fontsize=10,
    )
    axis.set_xlim(0, 1)
    rows = SHOWN * (1 + len(found))
    axis.set_ylim(rows, -0.5)
    # Queries whose exact search succeeds, each of another module.
    exact = list(found)[-1]
    shown: dict[str, int] = {}
    for index, query in enumerate(queries.tolist()):
        right_ones = [modules[one] == modules[query] for one in found[exact][index, :FOUND].tolist()]
        if all(right_ones):
            shown.setdefault(modules[query], index)
    for block, (module, index) in enumerate(list(shown.items())[:SHOWN]):
        top = block * (1 + len(found))
        text = textwrap.shorten(texts[queries[index]], 80, placeholder=" …").replace("$", r"\$")
        axis.text(0, top, f"{module}: “{text}”", fontsize=9.5, va="center")
        for below, (name, rankings) in enumerate(found.items(), 1):
            axis.text(0.02, top + below, name, fontsize=8, color=colours[name], va="center")
            for place, one in enumerate(rankings[index, :FOUND].tolist()):
                is_right = modules[one] == module
                text = textwrap.shorten(texts[one], 27, placeholder=" …").replace("$", r"\$")
                axis.text(
                    *(0.2 + 0.27 * place, top + below, f"{modules[one]}: {text}"),
                    fontsize=7.5,
                    va="center",
                    color="#006d2c" if is_right else "#888888",
                )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
