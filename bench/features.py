"""What feature sums are measured on: the miniature, the texts of its step 02, and dictionaries of random directions."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from stetholib.models.dictionary import Dictionary, random_dictionary, self_test
from stetholib.models.streams import collected, residual_batches, tokenize, up_to
from stetholib.models.sums import CONTRASTS, FeatureSums
from stetholib.study.sae_features import SaeFeatures
from stetholib.study.world import World

L0, SAMPLE = 8.0, 4096


class Heard:
    """The miniature and the texts that it reads."""

    def __init__(self, texts: int) -> None:
        """texts: how many, half of them mathematics."""
        world = World.open("mini")
        listening = SaeFeatures(world).listening
        chosen = range(0, len(listening.texts), max(1, len(listening.texts) // texts))
        self.base, self.layers, self._batch_tokens = world.base, world.layers, listening.batch_tokens
        read = tokenize(self.base, [("", listening.texts[at]) for at in chosen], listening.max_tokens)
        self._pairs = [(ids, 1) for ids, _ in read]
        self._corpus_of = torch.tensor([listening.corpus_of[at] for at in chosen])
        self._ceiling: dict[tuple[int, int], float] = {}

    def instruments(self, layers: Iterable[int], width: int) -> dict[int, tuple[Dictionary, Any]]:
        """For each layer the same weights twice: as our dictionary, and as SAELens' object."""
        from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

        found, (some, _) = {}, up_to(self._pairs, SAMPLE)
        for layer, x in collected(self.base, some, self._batch_tokens, layers).items():
            one = random_dictionary(x, width, L0, layer)
            other = JumpReLUSAE(JumpReLUSAEConfig(d_in=x.shape[1], d_sae=width, apply_b_dec_to_input=False))
            other.load_state_dict({name: tensor.contiguous() for name, tensor in vars(one).items()})
            found[layer] = (one, other.requires_grad_(False))
            self._ceiling[layer, width] = self_test(one, x).largest
        return found

    def sums(self, encoders: Mapping[int, Callable[[Tensor], Tensor]], width: int = 512) -> dict[int, FeatureSums]:
        """One pass over the texts: the sums of these layers' features."""
        found = {layer: FeatureSums(width, self._corpus_of, self._ceiling[layer, width]) for layer in encoders}
        for _, document, streams in residual_batches(self.base, self._pairs, self._batch_tokens, encoders):
            weights = {contrast: torch.ones(len(document)) for contrast in CONTRASTS}
            for layer, x in streams.items():
                found[layer].add(encoders[layer](x), document, weights)
        return found
