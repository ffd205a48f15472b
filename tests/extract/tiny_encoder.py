"""A text model of Hugging Face that is small enough for tests: randomly drawn, with a vocabulary of 17 word pieces."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (*SPECIAL, "a", "video", "of", "person", "clap", "hands", "jump", "wave", "##s", ".", "using", "##ing")
WIDTH, CONTEXT = 28, 12


def save_distilbert(folder: Path, *, seed: int = 5) -> Path:
    """A DistilBERT of two layers with its tokenizer, as save_pretrained leaves one."""
    sizes = {"dim": WIDTH, "n_heads": 4, "n_layers": 2, "hidden_dim": 40, "max_position_embeddings": CONTEXT}
    return save_model(folder, transformers.DistilBertConfig(vocab_size=len(WORDS), **sizes), seed=seed)


def save_model(folder: Path, config: Any, *, seed: int = 5, **options: Any) -> Path:
    """The model that a configuration describes, beside the vocabulary."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(config, **options)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder
