"""Loss spikes against the definition, computed plainly."""

import json
import math
import random

import numpy
import pytest

from seqengine.spikes import MIN_LOSSES, SpikeDetector


def falling_losses(count, seed=0):
    generator = random.Random(seed)
    return [2.0 + math.exp(-i / 100) + generator.gauss(0.0, 0.02) for i in range(count)]


def test_a_spike_is_what_the_definition_says():
    window, factor = 60, 3.0
    losses = [x + (0.5 if i % 37 == 0 else 0.0) for i, x in enumerate(falling_losses(400))]
    detector, found, wanted = SpikeDetector(window=window, factor=factor), [], []
    for i, loss in enumerate(losses):
        last = numpy.array(losses[max(0, i - window) : i])
        middle = numpy.median(last) if i else 0.0
        spread = numpy.median(numpy.abs(last - middle)) if i else 0.0
        wanted.append(bool(i >= MIN_LOSSES and loss > middle + factor * spread))
        found.append(detector.is_spike(loss))
    assert found == wanted
    assert sum(found) >= 9


def test_there_is_no_spike_among_the_first_losses():
    detector = SpikeDetector()
    assert not any(detector.is_spike(loss) for loss in [1.0] * (MIN_LOSSES - 1) + [1e9])
    assert detector.is_spike(1e9)


def test_equal_losses_and_their_rounding_are_no_spikes():
    detector = SpikeDetector()
    assert not any(detector.is_spike(1.5 + 1e-9 * (i % 3)) for i in range(300))
    assert detector.is_spike(1.5001)


def test_a_loss_that_is_not_finite_is_no_spike_and_does_not_join():
    detector = SpikeDetector()
    for loss in falling_losses(100):
        detector.is_spike(loss)
    before = detector.state()
    assert not any(detector.is_spike(bad) for bad in (math.nan, math.inf, -math.inf))
    assert detector.state() == before


def test_a_lasting_rise_becomes_the_usual_level():
    detector = SpikeDetector(window=100)
    for loss in falling_losses(200):
        detector.is_spike(loss)
    found = [detector.is_spike(4.0 + 0.001 * (i % 10)) for i in range(120)]
    assert found[0]
    assert not any(found[60:])


def test_a_restored_detector_goes_on_as_the_saved_one():
    losses = [x + (1.0 if i % 41 == 0 else 0.0) for i, x in enumerate(falling_losses(400, seed=1))]
    whole, first = SpikeDetector(), SpikeDetector()
    wanted = [whole.is_spike(loss) for loss in losses]
    found = [first.is_spike(loss) for loss in losses[:250]]
    second = SpikeDetector()
    second.is_spike(1e3)
    second.restore(json.loads(json.dumps(first.state())))
    assert found + [second.is_spike(loss) for loss in losses[250:]] == wanted
    assert any(wanted[250:])


def test_bad_settings_name_their_keys():
    with pytest.raises(ValueError, match=r"train\.spike_window: must be at least 50; got 49"):
        SpikeDetector(window=49)
    with pytest.raises(ValueError, match=r"train\.spike_factor: must be above 0; got nan"):
        SpikeDetector(factor=math.nan)
