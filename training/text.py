"""Tokenizers trained on the captions: a byte-level CLIP BPE and a T5 unigram model, both fast tokenizers."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

CLIP_LENGTH = 77
VOCABULARY = 1280
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789'-,.!?&()\u2581"


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def train_clip(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A CLIP tokenizer (start and end tokens, padded with the end token to 77)."""
    from tokenizers import Tokenizer, models, trainers

    alphabet = byte_alphabet()
    vocabulary = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    seed = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])
    inner = seed.backend_tokenizer
    model = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    model.normalizer, model.pre_tokenizer = inner.normalizer, inner.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    model.train_from_iterator(corpus, trainer)
    return clip_from(model.to_str())


def clip_from(serialised: str) -> PreTrainedTokenizerFast:
    """A CLIPTokenizer with the trained vocabulary and merges, special tokens last (as in CLIP)."""
    model = json.loads(serialised)["model"]
    # the trainer numbers the word-final letters differently on every run: give them a fixed order
    letters = sorted(token for token in model["vocab"] if len(token.removesuffix("</w>")) == 1)
    longer = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in set(letters)]
    vocabulary = {token: i for i, token in enumerate(letters + longer)}
    # every printable ASCII character can end a word: an unknown one would read as the end of the text
    for token in (
        *(chr(code) + "</w>" for code in range(33, 127) if not 65 <= code <= 90),
        "<|startoftext|>",
        "<|endoftext|>",
    ):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def pieces_of(corpus: list[str]) -> list[tuple[str, float]]:
    """Unigram pieces: whole words of the captions, what a unigram trainer finds inside them, single characters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    inner = Tokenizer(models.Unigram())
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=768, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(corpus, trainer)
    found = {
        piece: round(score, 6) for piece, score in json.loads(inner.to_str())["model"]["vocab"] if piece != "<unk>"
    }
    words = Counter(
        word for text in corpus for word, _ in inner.pre_tokenizer.pre_tokenize_str(text.lower().replace(",", ""))
    )
    total = sum(words.values())
    whole = {word: math.log(count / total) for word, count in words.most_common(1536)}
    letters = dict.fromkeys(CHARACTERS, -14.0)
    return list({**letters, **found, **whole, ",": -3.0}.items())


def train_t5(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A T5 tokenizer: unigram pieces, ``<pad>`` 0, ``</s>`` 1, ``<unk>`` 2, no sentinel tokens; lower-cases."""
    from tokenizers import normalizers

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    tokenizer = T5Tokenizer(vocab=special + pieces_of(corpus), extra_ids=0, model_max_length=512)
    inner = tokenizer.backend_tokenizer
    inner.normalizer = normalizers.Lowercase()  # T5Tokenizer would forget it when it is loaded again
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=512, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def save_tokenizers(corpus: list[str], folder: Path) -> None:
    """Train both and write them under ``folder/clip`` and ``folder/t5``."""
    train_clip(corpus).save_pretrained(folder / "clip")
    train_t5(corpus).save_pretrained(folder / "t5")


if __name__ == "__main__":
    import sys

    from captions import corpus
    from emoji import load_emoji

    save_tokenizers(corpus(load_emoji(sys.argv[1])), Path(sys.argv[2]))
