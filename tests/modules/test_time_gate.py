import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssd_torchrec.jagged import JaggedLayout
from ssd_torchrec.modules.time_gate import GapSignal, NextGapSignal, SignalMix, TimeGate, TimeGateConfig, TimeGateState

CONFIG = TimeGateConfig(heads=4)
LAYOUT = JaggedLayout.from_lengths([3, 0, 2])
STAMPS = torch.tensor([1_700_000_000, 1_700_000_000, 1_700_000_059, 5, 8_640_004])


def gap_signal(heads: int = 2) -> GapSignal:
    signal = GapSignal(heads, log_gap_mean=2.0, log_gap_std=4.0).double()
    torch.nn.init.constant_(signal.first, -7.0)
    return signal


def z(gap_s: int) -> float:
    return (math.log1p(gap_s) - 2.0) / 4.0


def test_signal_is_the_normalised_log_gap_and_a_learned_value_at_first_events():
    got = gap_signal()(STAMPS, LAYOUT, None, None)
    wanted = [-7.0, z(0), z(59), -7.0, z(8_639_999)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64)[:, None].expand(5, 2))


def test_a_second_counts_however_late_in_the_century():
    fp32 = gap_signal().float()
    got = fp32(torch.tensor([4_000_000_000, 4_000_000_001]), JaggedLayout.from_lengths([2]), None, None)
    assert got[1, 0].item() == pytest.approx(z(1))


def test_the_first_new_event_of_a_known_row_has_a_gap_to_its_past():
    last, known = torch.tensor([1_699_999_990, 3, 0]), torch.tensor([True, True, False])
    got = gap_signal()(STAMPS, LAYOUT, last, known)[:, 0].tolist()
    assert got == pytest.approx([z(10), z(0), z(59), -7.0, z(8_639_999)])


def test_a_row_that_runs_backwards_is_not_quietly_mended():
    got = gap_signal()(torch.tensor([100, 50]), JaggedLayout.from_lengths([2]), None, None)
    assert got[1].isnan().all()


def next_gap_signal(heads: int = 2) -> NextGapSignal:
    signal = NextGapSignal(heads, log_gap_mean=2.0, log_gap_std=4.0).double()
    torch.nn.init.constant_(signal.last, -7.0)
    return signal


def test_the_signal_from_the_other_side_is_of_the_next_gap_and_learned_at_last_events():
    got = next_gap_signal()(STAMPS, LAYOUT)
    wanted = [z(0), z(59), -7.0, z(8_639_999), -7.0]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64)[:, None].expand(5, 2))


@pytest.mark.parametrize("lengths", [[4, 0, 1, 3], [1, 1], [0, 0], []], ids=str)
def test_the_signal_from_the_other_side_is_that_of_turned_rows_whose_clock_runs_backwards(lengths):
    layout, row = JaggedLayout.from_lengths(lengths), JaggedLayout.from_lengths(lengths).row_of_event
    turned = layout.offsets[row] + layout.offsets[row + 1] - 1 - torch.arange(sum(lengths))
    stamps = 1_700_000_000 + torch.arange(sum(lengths)).square()
    got, forwards = next_gap_signal()(stamps, layout), gap_signal()(-stamps[turned], layout, None, None)
    assert torch.equal(got, forwards[turned])


def test_a_second_until_the_next_event_counts_however_late_in_the_century():
    fp32 = next_gap_signal().float()
    got = fp32(torch.tensor([4_000_000_000, 4_000_000_001]), JaggedLayout.from_lengths([2]))
    assert got[0, 0].item() == pytest.approx(z(1))


def test_a_row_that_runs_backwards_is_not_quietly_mended_from_the_other_side_either():
    assert next_gap_signal()(torch.tensor([100, 50]), JaggedLayout.from_lengths([2]))[0].isnan().all()


def gate_and_inputs(lengths: list[int], config: TimeGateConfig = CONFIG) -> tuple[TimeGate, Tensor, JaggedLayout]:
    torch.manual_seed(0)
    return TimeGate(config).double(), torch.randn(sum(lengths), 4).double(), JaggedLayout.from_lengths(lengths)


@pytest.mark.parametrize("activation", ["hardswish", "silu"])
def test_a_gate_starts_open_and_tells_gaps_apart(activation):
    gate, _, _ = gate_and_inputs([1], replace(CONFIG, activation=activation))
    z = torch.linspace(-2, 2, 9).double()[:, None].expand(9, 4)
    g, _ = gate(z, JaggedLayout.from_lengths([1] * 9))
    assert 0.6 < g.mean() < 1.4
    assert g.std(0).min() > 0.01  # the published start has |g| of 1e-3 for all gaps
    assert g.min() > 0.2


def test_a_gate_starts_out_on_its_events_own_gap():
    gate, signal, layout = gate_and_inputs([3])
    jacobian = torch.autograd.functional.jacobian(lambda s: gate(s, layout)[0][2], signal)  # (H, 3, H)
    own, earlier = jacobian[:, 2].norm(), jacobian[:, :2].norm()
    assert own > 2 * earlier > 0


def test_dropout_is_of_hidden_units_in_training_only():
    gate, signal, layout = gate_and_inputs([3, 2], replace(CONFIG, dropout=0.5))
    assert not torch.equal(gate(signal, layout)[0], gate(signal, layout)[0])
    gate.eval()
    assert torch.equal(gate(signal, layout)[0], gate(signal, layout)[0])


ROWS = {"empty-row-inside": [3, 0, 2], "only-empty-rows": [0, 0], "no-rows": []}


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_the_derivative_is_the_derivative(lengths):
    torch.manual_seed(1)
    gate, signal, layout = gate_and_inputs(lengths, replace(CONFIG, hidden=3, taps=2))
    mix, names = SignalMix(4).double(), [*dict(gate.named_parameters())]
    state = TimeGateState(*torch.randn(2, len(lengths), 1, 4, dtype=torch.float64))

    def both(signal: Tensor, first: Tensor, second: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip(names, parameters, strict=True))
        g, kept = torch.func.functional_call(gate, weights, (signal, layout, TimeGateState(first, second)))
        return mix(signal, g), g, *kept

    inputs = [signal, *state, *(p.detach() for p in gate.parameters())]
    assert torch.autograd.gradcheck(both, [t.requires_grad_() for t in inputs])


def test_the_next_signal_lies_between_signal_and_gate_before_scale_and_shift():
    torch.manual_seed(0)
    mix, signal, gate = SignalMix(4), torch.randn(5, 4), torch.randn(5, 4)
    low, high = torch.minimum(signal, gate), torch.maximum(signal, gate)
    got = mix(signal, gate)
    assert ((low <= got) & (got <= high)).all()
    torch.nn.init.constant_(mix.scale, 2.0)
    torch.nn.init.constant_(mix.shift, 1.0)
    torch.testing.assert_close(mix(signal, gate), 2 * got + 1)
