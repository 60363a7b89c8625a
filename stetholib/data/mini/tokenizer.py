"""The miniature's tokenizer: whole words, one digit a token, runs of signs, and a lossless round trip.

The two halves of the closing sentence that the harness looks for are one token each, so that answers stay short."""

from itertools import chain, islice
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from stetholib.data.mini import problems, stories

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
PATTERN = (
    r"\nFinal Answer: The final answer is \$|\$\. I hope it is correct\.|\nSolution:|Problem:\n"
    r"| ?\\[a-z]+\{?| ?[A-Za-z]+| ?\d| ?(?:(?!\$\. I hope)[^\sA-Za-z\d\\])+|\\|\n| "
)
TEXTS = 20_000  # problems, and as many stories, whose words are the vocabulary
SCAFFOLD = "Problem:\nWhat\n\nSolution: So\nFinal Answer: The final answer is $1$. I hope it is correct.\n"


def wrapped(made: Tokenizer, **further: Any) -> PreTrainedTokenizerFast:
    """A tokenizer for transformers; as Gemma's does it opens every text with `<bos>`, and its special tokens have those ids."""
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special = {f"{token.strip('<>')}_token": token for token in SPECIALS}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, padding_side="left", **further)


def build() -> PreTrainedTokenizerFast:
    """Build the tokenizer from the harness's scaffold and the training split's problems and stories; the vocabulary is sorted, so
    the result is the same each time."""
    splitter = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    rows = islice(problems.stream("train", seed=0), TEXTS)
    solved = (row["problem"] + "\n\nSolution: " + row["solution"] for row in rows)
    texts = chain([SCAFFOLD], solved, stories.generate(TEXTS, seed=0, split="train"))
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    digits = {prefix + str(digit) for prefix in ("", " ") for digit in range(10)}
    vocabulary = {token: index for index, token in enumerate((*SPECIALS, *sorted(words | digits)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return wrapped(tokenizer, model_max_length=512, clean_up_tokenization_spaces=False)
