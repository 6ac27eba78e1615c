"""Write the text from which second moments on tinyfacts are taken: some of the sentences it was trained on.

python tools/make_corpus.py
"""

from __future__ import annotations

import random
from importlib.resources import files
from pathlib import Path

from easyeditor.data.tinyfacts import TinyFacts

COUNT, SEED = 2000, 0


def main() -> None:
    """Draw the sentences, seeded, and write them beside the fact table, one per line."""
    sentences = random.Random(SEED).sample(TinyFacts().sentences(), COUNT)
    Path(str(files("easyeditor") / "tinyfacts" / "corpus.txt")).write_text(
        "\n".join(sentences) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
