# SPDX-License-Identifier: Apache-2.0
"""The options of the recurrent layers that torch.nn does not have."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close, assert_same_bits
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyseq import functional, nn, reference
from pyseq._dropout import apply_dropout, bernoulli_mask

I, H, T, B = 4, 6, 5, 3  # noqa: E741  (the letters of the docstrings)

#: Class name and the options that make it another cell.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 2}),
}
#: With the cells of which torch.nn has none.
ALL_KINDS = KINDS | {
    "gru_reset_before": ("GRU", {"reset_after": False}),
    "indrnn": ("IndRNN", {}),
    "slstm": ("SLSTM", {"num_heads": 2}),
}
#: One value of each option that changes what a call in training gives.
OPTIONS: dict[str, dict[str, Any]] = {
    "residual": {"residual": True},
    "variational_dropout": {"variational_dropout": 0.4},
    "weight_dropout": {"weight_dropout": 0.4},
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "zoneout_h": {"zoneout_h": 0.4},
    "layer_norm": {"layer_norm": True},
}
#: Those of them that draw masks.
RANDOM = tuple(name for name in OPTIONS if name not in ("residual", "layer_norm"))


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The tensors are tiny: more threads would only wait for one another."""
    set_threads(1)


def make(kind: str, **options: Any) -> Any:
    """A module in float64, always with the same weights."""
    name, extra = ALL_KINDS[kind]
    torch.manual_seed(1)
    return getattr(nn, name)(I, H, **{"dtype": torch.float64, **extra, **options})


def make_x() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)


def flat(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def run(module: torch.nn.Module, x: Tensor, *args: Any, **options: Any) -> dict[str, Tensor]:
    """Outputs, and the gradients of their squares' sum, after the same seed each time."""
    torch.manual_seed(3)
    output, last = module(x, *args, **options)
    named = {"output": output} | {f"state{i}": part for i, part in enumerate(flat(last))}
    inputs = {"x": x} | dict(module.named_parameters())
    total = torch.stack([value.square().sum() for value in named.values()]).sum()
    grads = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True)
    return named | {f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_add_nothing(kind: str) -> None:
    module = make(kind, num_layers=2, bidirectional=True)
    name, extra = KINDS[kind]
    torch.manual_seed(1)
    theirs = getattr(torch.nn, name)(
        I, H, num_layers=2, bidirectional=True, dtype=torch.float64, **extra
    )
    assert list(module.state_dict()) == list(theirs.state_dict())
    assert repr(module) == repr(theirs)


@pytest.mark.parametrize("option", RANDOM)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_follow_the_seed_and_no_number_of_threads(
    kind: str, option: str, set_threads: Callable[[int], None]
) -> None:
    module = make(kind, num_layers=2, bidirectional=True, **OPTIONS[option])
    x = make_x()
    first = run(module, x)
    set_threads(2)
    again = run(module, x)
    for name in ("output", "state0"):
        assert torch.equal(first[name], again[name])
    torch.manual_seed(4)
    assert not torch.equal(module(x)[0], first["output"])


@pytest.mark.parametrize("option", RANDOM)
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_in_evaluation(kind: str, option: str) -> None:
    module = make(kind, num_layers=2, bidirectional=True, **OPTIONS[option]).eval()
    plain = make(kind, num_layers=2, bidirectional=True)
    x = make_x()
    same = torch.equal(module(x)[0], plain(x)[0])
    if option == "zoneout_h":  # which has its expectation there
        assert not same
        return
    assert_same_bits(run(module, x), run(plain, x))


@pytest.mark.parametrize("option", [*OPTIONS, "learned_state"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_do_the_same(kind: str, option: str) -> None:
    options = OPTIONS.get(option, {option: True})
    module, x = make(kind, num_layers=2, **options), make_x()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_bits(run(twin, x), run(module, x))
        assert repr(twin) == repr(module)
    (value,) = options.values()
    assert repr(module).endswith(f", {option}={value})")


def test_a_module_pickled_before_there_were_options_still_runs() -> None:
    old, x = make("lstm"), make_x()
    expected = run(old, x)
    for name in (*OPTIONS, "zoneout_c", "learned_state", "forget_bias"):
        del old.__dict__[name]
    assert_same_bits(run(pickle.loads(pickle.dumps(old)), x), expected)


def test_a_module_pickled_by_version_0_1_keeps_its_states_as_it_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = nn.LSTM(3, 4, keep_every=3)
    for name in [each for each in vars(old) if hasattr(nn.LSTM, each) and each != "keep_every"]:
        del old.__dict__[name]
    kept = []
    scan = functional.scan

    def recorded(*args: Any, **options: Any) -> Any:
        kept.append(options.get("keep_every", 1))
        return scan(*args, **options)

    monkeypatch.setattr(functional, "scan", recorded)
    pickle.loads(pickle.dumps(old))(torch.randn(5, 2, 3))
    assert kept == [3]


# One option after the other


def test_options_are_checked_whenever_they_are_set() -> None:
    module = nn.LSTM(I, H, zoneout_h=0)
    assert isinstance(module.zoneout_h, float)
    for name in ("variational_dropout", "zoneout_c"):
        with pytest.raises(ValueError, match=rf"{name} must be a probability in \[0, 1\], got 3"):
            setattr(module, name, 3.0)
        setattr(module, name, 1)
    for value in (0, 2.5):
        with pytest.raises(ValueError, match=f"keep_every must be a positive integer, got {value}"):
            module.keep_every = value  # type: ignore[assignment]


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_calls_with_the_same_masks_drop_the_same(name: str) -> None:
    options: dict[str, Any] = {"variational_dropout": 0.4, "recurrent_dropout": 0.3}
    options |= {"weight_dropout": 0.2, "zoneout_h": 0.3, "dropout": 0.3}
    module = getattr(nn, name)(I, H, 2, dtype=torch.float64, **options)
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch.manual_seed(3)
    expected = module(x)[0]
    torch.manual_seed(3)
    masks = module.draw_masks(T, B)
    assert torch.equal(module(x, masks=masks)[0], expected)
    # Parts of a sequence, as in truncated back-propagation.
    first, state = module(x[:2], masks=masks.of_steps(0, 2))
    second, _ = module(x[2:], state, masks=masks.of_steps(2, T))
    assert_close({"y": torch.cat((first, second))}, {"y": expected})
    with pytest.raises(RuntimeError, match=f"masks must be drawn for T, B = {T - 1}, {B}, got {T}"):
        module(x[1:], masks=masks)
    with pytest.raises(ValueError, match=f"steps must be from 0 to {T}, .*, got 1 to {T + 1}"):
        masks.of_steps(1, T + 1)
    packed = torch.nn.utils.rnn.pack_sequence([x[:, 0]])
    for bad, module_ in ((packed, module), (x, copy.deepcopy(module).eval())):
        with pytest.raises(ValueError, match="masks must be None in evaluation, and for a Packed"):
            module_(bad, masks=masks)
    assert module.eval().draw_masks(T, B) is None


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("kind", KINDS)
def test_residual_adds_the_input_of_every_layer_that_it_fits(
    kind: str, bidirectional: bool
) -> None:
    options = {"num_layers": 3, "bidirectional": bidirectional}
    module = make(kind, residual=True, **options)
    x, lengths = make_x(), torch.tensor([5, 2, 0])
    actual = module(x, lengths=lengths)[0]

    layers = [make(kind, bidirectional=bidirectional)]
    width = layers[0](x)[0].shape[-1]
    name, extra = KINDS[kind]
    for _ in range(2):
        layer = getattr(nn, name)(
            width, H, bidirectional=bidirectional, dtype=torch.float64, **extra
        )
        layers.append(layer)
    state = module.state_dict()
    for k, layer in enumerate(layers):
        own = {n.replace("_l0", f"_l{k}"): n for n in layer.state_dict()}
        layer.load_state_dict({short: state[long] for long, short in own.items()})
    expected = layers[0](x, lengths=lengths)[0]
    if width == I:
        expected = expected + x * (torch.arange(T).unsqueeze(1) < lengths).unsqueeze(2)
    for layer in layers[1:]:
        expected = layer(expected, lengths=lengths)[0] + expected
    assert_close({"output": actual}, {"output": expected})
    assert (actual[2:, 1] == 0).all()
    assert (actual[:, 2] == 0).all()


def test_residual_goes_around_the_dropout() -> None:
    module = make("gru", num_layers=2, dropout=1.0, residual=True)
    x = make_x()
    nothing = make("gru", num_layers=2, dropout=1.0)(x)[0]
    below = make("gru")
    below.load_state_dict({n: module.state_dict()[n] for n in below.state_dict()})
    assert_close({"output": module(x)[0]}, {"output": nothing + below(x)[0]})


def test_residual_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"residual .* input_size 12, got num_layers 1 and .* 4"):
        nn.GRU(4, 6, bidirectional=True, residual=True)
    nn.GRU(12, 6, bidirectional=True, residual=True)


@pytest.mark.parametrize("kind", KINDS)
def test_variational_dropout_has_one_mask_for_all_steps(kind: str) -> None:
    module, x = make(kind, variational_dropout=0.5), make_x()
    torch.manual_seed(3)
    mask = apply_dropout(torch.ones(B, I, dtype=torch.float64), 0.5)
    assert mask.eq(0).any()
    plain = make(kind)
    assert_same_bits({"output": run(module, x)["output"]}, {"output": plain(x * mask)[0]})
    assert (run(module, x)["d_x"] == 0).all(0)[mask == 0].all()


def test_variational_dropout_meets_every_layer() -> None:
    module = make("gru", num_layers=2, variational_dropout=1.0)
    zero = make("gru", num_layers=2)
    zero.load_state_dict(
        {n: v * 0 if "weight_ih" in n else v for n, v in module.state_dict().items()}
    )
    x = make_x()
    assert_close({"output": module(x)[0]}, {"output": zero(x)[0]})


@pytest.mark.parametrize("kind", KINDS)
def test_weight_dropout_drops_numbers_of_the_recurrent_weights(kind: str) -> None:
    module, x = make(kind, weight_dropout=0.5), make_x()
    weight = module.weight_hh_l0
    torch.manual_seed(3)
    mask = apply_dropout(torch.ones_like(weight), 0.5)
    plain = make(kind)
    plain.load_state_dict(module.state_dict() | {"weight_hh_l0": weight.detach() * mask})
    actual, expected = run(module, x), run(plain, x)
    expected["d_weight_hh_l0"] = expected["d_weight_hh_l0"] * mask
    assert_close(actual, expected)


def scanned(module: Any, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """What the reference gives for a module of one layer and direction."""
    if module.layer_norm:
        options["layer_norm"] = module._layer_norms()[0]
    weights = [
        getattr(module, f"{kind}_l0", None)
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    ]
    output, state = reference.scan(x, *weights, cell=module.cell, **options)
    return output, flat(state)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_recurrent_dropout_has_one_mask_for_all_steps(kind: str) -> None:
    module, x = make(kind, recurrent_dropout=0.5), make_x()
    torch.manual_seed(3)
    mask = apply_dropout(torch.ones(B, module.proj_size or H, dtype=torch.float64), 0.5)
    expected = scanned(module, x, h_mask=mask)[0]
    assert_close({"y": run(module, x)["output"]}, {"y": expected})


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", KINDS)
def test_zoneout_draws_for_every_step_and_takes_the_expectation(kind: str, training: bool) -> None:
    options = {"zoneout_h": 0.3} | ({"zoneout_c": 0.6} if "lstm" in kind else {})
    module, x = make(kind, **options).train(training), make_x()
    torch.manual_seed(3)
    shares = {}
    for name, probability in options.items():
        size = (module.proj_size or H) if name == "zoneout_h" else H
        if training:
            shares[name] = bernoulli_mask((T, B, size), probability, x)
        else:
            shares[name] = torch.full((1, 1, size), probability, dtype=torch.float64)
    expected, state = scanned(module, x, **shares)
    actual = run(module, x)
    assert_close({"y": actual["output"]}, {"y": expected})
    for i, part in enumerate(state):
        assert_close({"s": actual[f"state{i}"]}, {"s": part.unsqueeze(0)})


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_options_work_together(kind: str, bidirectional: bool) -> None:
    options = {
        "variational_dropout": 0.2,
        "recurrent_dropout": 0.2,
        "weight_dropout": 0.2,
        "zoneout_h": 0.2,
        "residual": True,
        "layer_norm": True,
        "learned_state": True,
        "dropout": 0.2,
    }
    if "lstm" in kind:
        options |= {"zoneout_c": 0.2, "forget_bias": 1.0}
    module = make(kind, num_layers=2, bidirectional=bidirectional, batch_first=True, **options)
    x = make_x().detach().transpose(0, 1).requires_grad_()
    call = {"lengths": torch.tensor([5, 2, 0]), "resets": torch.rand(B, T) < 0.3}
    first, again = run(module, x, **call), run(module, x, **call)
    assert_same_bits(first, again)
    assert all(value.isfinite().all() for value in first.values())
    assert all((first[f"d_{name}"] != 0).any() for name, _ in module.named_parameters())
    assert (first["output"][1, 2:] == 0).all()
    module.keep_every = 2
    assert_close(run(module, x, **call), first)
    with torch.no_grad():
        torch.manual_seed(3)
        assert_close({"y": module(x, **call)[0]}, {"y": first["output"].detach()})


@pytest.mark.parametrize("kind", KINDS)
def test_layer_norm_is_the_references(kind: str) -> None:
    module, x = make(kind, layer_norm=True), make_x()
    new = {"gain_ih_l0", "gain_hh_l0"} | ({"gain_c_l0", "bias_c_l0"} if "lstm" in kind else set())
    assert set(module.state_dict()) - set(make(kind).state_dict()) == new
    for name in new:
        parameter = getattr(module, name)
        assert (parameter == (0 if name.startswith("bias") else 1)).all()
        torch.nn.init.normal_(parameter)
    lengths, resets = torch.tensor([5, 2, 0]), torch.rand(T, B) < 0.3
    actual = run(module, x, lengths=lengths, resets=resets)
    output, state = scanned(module, x, lengths=lengths, resets=resets)
    named = {"output": output} | {f"state{i}": part.unsqueeze(0) for i, part in enumerate(state)}
    inputs = {"x": x} | dict(module.named_parameters())
    total = torch.stack([value.square().sum() for value in named.values()]).sum()
    grads = torch.autograd.grad(total, list(inputs.values()))
    named |= {f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    assert_close(actual, named)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_norm_takes_no_notice_of_the_scale_of_the_weights(kind: str) -> None:
    module, x = make(kind, layer_norm=True), make_x()
    expected = module(x)[0]
    with torch.no_grad():
        module.weight_ih_l0.mul_(1000)
        module.weight_hh_l0.mul_(1000)
    # The epsilon under the root shows before, not after.
    torch.testing.assert_close(module(x)[0], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_resets_return_to_the_learned_state(kind: str, bidirectional: bool, grad: bool) -> None:
    module = make(kind, num_layers=2, bidirectional=bidirectional, learned_state=True)
    for part in module.parameters():
        torch.nn.init.normal_(part, std=0.5)
    x = make_x()
    resets = torch.ones(T, B, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        output = module(x, resets=resets)[0]
        alone = torch.cat([module(step.unsqueeze(0))[0] for step in x])
    assert_close({"y": output}, {"y": alone})
    if grad:
        got, want = (torch.autograd.grad(y.square().sum(), module.h_0) for y in (output, alone))
        assert_close({"h_0": got[0]}, {"h_0": want[0]})


@pytest.mark.parametrize("kind", ["gru", "lstm_proj"])
def test_compile_keeps_one_graph(kind: str) -> None:
    module, x = make(kind, recurrent_dropout=0.3, zoneout_h=0.2, learned_state=True), make_x()
    resets = torch.rand(T, B) < 0.3
    torch._dynamo.reset()  # what other tests compiled counts as recompilations
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    compiled(x, resets=resets)
    assert_close(
        run(compiled, x, resets=resets),
        {
            name.replace("d_", "d__orig_mod.") if name not in ("d_x",) else name: value
            for name, value in run(module, x, resets=resets).items()
        },
    )


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_learned_state_stands_in_for_one_that_is_not_given(kind: str, bidirectional: bool) -> None:
    options = {"num_layers": 2, "bidirectional": bidirectional}
    module, x = make(kind, learned_state=True, **options), make_x()
    plain = make(kind, **options)
    named = [name for name, _ in module.named_parameters(recurse=False) if name.endswith("_0")]
    assert named == {"slstm": ["h_0", "c_0", "m_0"]}.get(
        kind, ["h_0", "c_0"] if "lstm" in kind else ["h_0"]
    )
    learned = [getattr(module, name) for name in named]
    assert all((part == 0).all() for part in learned)
    for name, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    with torch.no_grad():
        for part in learned:
            part.copy_(torch.randn_like(part))
    parts = [part.unsqueeze(1).expand(-1, B, -1) for part in learned]
    if kind == "slstm":
        parts.insert(2, torch.ones_like(parts[0]))  # n, which m scales
    state: Any = parts[0] if len(parts) == 1 else tuple(parts)

    actual = module(x)
    expected = plain(x, state)
    assert_close({"y": actual[0]}, {"y": expected[0]})
    got = torch.autograd.grad(actual[0].square().sum(), learned)
    want = torch.autograd.grad(expected[0].square().sum(), learned)
    assert_close(dict(zip(named, got, strict=True)), dict(zip(named, want, strict=True)))
    with torch.no_grad():
        assert_close({"y": module(x)[0]}, {"y": expected[0].detach()})

    zero: Any = [torch.zeros_like(part) for part in parts]
    zero = zero[0] if len(zero) == 1 else tuple(zero)
    assert torch.equal(module(x, zero)[0], plain(x)[0])
    alone = module(x[:, 1])[0]
    assert_close({"y": alone}, {"y": actual[0][:, 1]})


def test_learned_state_goes_with_packed_rows() -> None:
    module, x = make("lstm", learned_state=True), make_x()
    torch.nn.init.normal_(module.h_0)
    lengths = torch.tensor([2, 5, 3])
    packed, _ = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    expected, _ = module(x, lengths=lengths)
    assert_close({"y": pad_packed_sequence(packed)[0]}, {"y": expected})


def test_slstm_learns_its_initial_state() -> None:
    """Zero is the empty state, from which no gradient comes: it starts beside it."""
    module, x = make("slstm", learned_state=True), make_x()
    module(x)[0].square().sum().backward()
    for part in (module.c_0, module.m_0):
        assert part.grad is not None
    assert (module.c_0.grad != 0).all()
    module.reset_parameters()
    assert (module.m_0 == 0).all()


def test_keep_every_is_an_option_of_the_constructor() -> None:
    x = make_x()
    for kind in ALL_KINDS:
        module, plain = make(kind, num_layers=2, keep_every=2), make(kind, num_layers=2)
        assert "keep_every=2" in repr(module)
        assert_close(run(module, x), run(plain, x))
    with pytest.raises(ValueError, match="keep_every must be a positive integer, got 0"):
        nn.GRU(I, H, keep_every=0)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
def test_forget_bias_is_the_sum_of_both_biases(bidirectional: bool) -> None:
    module = nn.LSTM(I, H, num_layers=2, bidirectional=bidirectional, forget_bias=1.5)
    for _ in range(2):
        for name, bias in module.named_parameters():
            forget, others = bias[H : 2 * H], bias[2 * H :]
            if name.startswith("bias_ih"):
                assert (forget == 1.5).all()
            elif name.startswith("bias_hh"):
                assert (forget == 0).all()
            assert (others != 0).all()
        module.reset_parameters()
    assert repr(module).endswith("forget_bias=1.5)")


def test_options_out_of_their_range_are_refused() -> None:
    for name in RANDOM:
        for value in (-0.1, 1.5, True, "0.5"):
            with pytest.raises(ValueError, match=rf"{name} must be a probability .* got {value!r}"):
                nn.LSTM(I, H, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="forget_bias needs bias=True, got forget_bias 1"):
        nn.LSTM(I, H, bias=False, forget_bias=1)


def test_bernoulli_masks_hit_their_share() -> None:
    torch.manual_seed(0)
    like = torch.empty(0, dtype=torch.float64)
    mask = bernoulli_mask((1000, 100), 0.15, like)
    assert mask.dtype == torch.float64
    assert ((mask == 0) | (mask == 1)).all()
    assert abs(mask.mean().item() - 0.15) < 0.0057  # five standard deviations
    assert (bernoulli_mask((7,), 0.0, like) == 0).all()
    assert (bernoulli_mask((7,), 1.0, like) == 1).all()
