# SPDX-License-Identifier: Apache-2.0
"""The searches by name: each finds its options, and who is to follow them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .beams import beam_search
from .draws import draw_seed
from .evaluation import in_eval_mode
from .followed import follow, follow_streaming
from .fused import fused_search_of, search_fused, search_whole
from .options import Hypothesis, SearchOptions, StreamedToken
from .protocols import SearchModel
from .resident import search_resident
from .rules import check_given


def search(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    *,
    generator: torch.Generator | None = None,
) -> list[list[Hypothesis]]:
    """Find target sequences for each source, as :func:`greedy`, :func:`sample` and
    :func:`beam` do, with all options.

    Args:
        model: the model; dropout is off during the search, whatever its mode.
        source: (B, S) int64, token ids.
        source_lengths: (B,) int64, valid tokens of each row.
        options: what to look for and how.
        generator: source of randomness for ``options.sample``, on the device of the model.
            Default: torch's.

    Returns:
        For each row ``options.n_best`` hypotheses, the best one first; draws in their order.
        Fewer, but one at least, if the search found no more.

    Raises:
        ValueError: the prefix or the coverage penalty does not go with the sources or the
            model.
        SearchError: the model's logits are not finite; a RuntimeError.
        TypeError: the options are none, or what must be a tensor is none.
    """
    check_given(options, source, source_lengths)
    if source.shape[0] == 0:
        return []
    seed = draw_seed(generator, source.device) if options.sample else None
    found = search_whole(model, source, source_lengths, options, seed)
    if found is not None:
        return found
    model = in_eval_mode(model)
    fused = fused_search_of(model, options)
    if fused is not None:
        return search_fused(model, fused, source, source_lengths, options, seed)
    if source.device.type != "cpu":
        return search_resident(model, source, source_lengths, options, seed)
    if options.follows_one():
        return follow(model, source, source_lengths, options, seed)
    return beam_search(model, source, source_lengths, options)


def stream(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    options: SearchOptions,
    *,
    generator: torch.Generator | None = None,
) -> Iterator[StreamedToken]:
    """Yield the tokens of greedy search or sampling one by one, as they are found.

    Between two tokens of a row the model makes one step. They are those that :func:`search`
    finds with the same options and the same generator; but where the options come to forbid
    every token, :func:`search` finds nothing for the row, and what the stream has given until
    then stands. The model must not be changed before the end.

    Args:
        model, source, source_lengths, generator: as in :func:`search`.
        options: as in :func:`search`, of one hypothesis for each row and without penalties.

    Returns:
        An iterator: for each step one token of each unfinished row, in the order of the rows.

    Raises:
        ValueError, SearchError, TypeError: as :func:`search`; the options are checked at once.
    """
    check_given(options, source, source_lengths)
    if not options.follows_one() or options.n_best != 1:
        raise ValueError(
            "a stream follows one hypothesis: beam_size and n_best must be 1 and the penalties 0, "
            f"got beam_size={options.beam_size}, n_best={options.n_best}, "
            f"length_penalty={options.length_penalty}, coverage_penalty={options.coverage_penalty}"
        )
    seed = draw_seed(generator, source.device) if options.sample else None
    return follow_streaming(in_eval_mode(model), source, source_lengths, options, seed)


def greedy(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    *,
    max_length: int,
    need_weights: bool = True,
) -> list[Hypothesis]:
    """Take the likeliest token at every step.

    Args:
        model, source, source_lengths: as in :func:`search`.
        max_length, need_weights: see :class:`SearchOptions`.

    Returns:
        One hypothesis per row.

    Raises:
        ValueError: an option is out of its range.
        SearchError: the model's logits are not finite; a RuntimeError.
    """
    options = SearchOptions(max_length=max_length, need_weights=need_weights)
    return _firsts(search(model, source, source_lengths, options))


def sample(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    *,
    max_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    need_weights: bool = True,
) -> list[Hypothesis]:
    """Draw every token from the model's distribution, sharpened or cut.

    The scores are log-probabilities under the model itself, whatever the options.

    Args:
        model, source, source_lengths, generator: as in :func:`search`.
        max_length, temperature, top_k, top_p, need_weights: see :class:`SearchOptions`.

    Returns:
        One hypothesis per row.

    Raises:
        ValueError: an option is out of its range.
        SearchError: the model's logits are not finite; a RuntimeError.

    Reference:
        Fan et al. 2018, arXiv 1805.04833 (top-k); Holtzman et al. 2020, arXiv 1904.09751,
        eq. 2 and 3 (top-p).
    """
    options = SearchOptions(
        max_length=max_length,
        sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        need_weights=need_weights,
    )
    return _firsts(search(model, source, source_lengths, options, generator=generator))


def beam(
    model: SearchModel,
    source: Tensor,
    source_lengths: Tensor,
    *,
    max_length: int,
    beam_size: int,
    length_penalty: float = 0.0,
    coverage_penalty: float = 0.0,
    need_weights: bool = True,
) -> list[Hypothesis]:
    """Follow the ``beam_size`` best unfinished hypotheses of each row.

    A hypothesis is finished when ``<stop>`` is among the ``beam_size`` best continuations
    of its row. Finished ones are compared by ``log P / lp + cp``, with
    ``lp = ((5 + n) / 6) ** length_penalty`` for n emitted tokens, ``<stop>`` included, and
    ``cp = coverage_penalty * sum_s log(min(sum_t a_t(s), 1))`` for the attention weights a_t
    of those n steps at the row's source positions s. A row is done when no unfinished
    hypothesis can become better than the finished ones to be returned. Those that max_length
    cuts off compete as they are.

    Args:
        model, source, source_lengths: as in :func:`search`.
        max_length, beam_size, length_penalty, coverage_penalty, need_weights: see
            :class:`SearchOptions`.

    Returns:
        The best hypothesis of each row; its score is log P, without the penalties.

    Raises:
        ValueError: an option is out of its range, or the model has no attention for the
            coverage penalty.
        SearchError: the model's logits are not finite; a RuntimeError.

    Reference:
        Wu et al. 2016, arXiv 1609.08144, eq. 14.
    """
    options = SearchOptions(
        max_length=max_length,
        beam_size=beam_size,
        length_penalty=length_penalty,
        coverage_penalty=coverage_penalty,
        need_weights=need_weights,
    )
    return _firsts(search(model, source, source_lengths, options))


def _firsts(found: list[list[Hypothesis]]) -> list[Hypothesis]:
    return [hypotheses[0] for hypotheses in found]
