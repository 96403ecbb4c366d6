"""A T5 with random weights and a tokenizer of whole words: each caption gets embeddings of its own."""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


def save_text_encoder(folder: str | Path, captions: list[str], width: int = 32) -> str:
    """Save both to a folder, with the words of some captions, and return it."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "</s>", "<unk>"]
    words.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=special))
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)
    sizes = {"d_model": width, "d_kv": 16, "num_heads": width // 16, "d_ff": 2 * width, "num_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5EncoderModel(T5Config(vocab_size=words.get_vocab_size(), **sizes))
    model.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    kinds = "dress hat longsleeve outwear pants shirt shoes shorts skirt t-shirt"
    save_text_encoder(sys.argv[1], [f"a photo of a {kind}" for kind in kinds.split()], width=128)
