"""The bench measures what it says: its peers do the same work as ours, and its ratios are fair."""
import json
import statistics

import pytest
import torch

import bench
import data


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return bench.photographs(tmp_path_factory.mktemp("photographs"), count=3, size=(160, 120))


def test_the_pipeline_of_pictures_gives_what_torchvisions_does(known):
    """Where the sizes agree, 160 x 120 to 320 x 240: every pixel and every box."""
    ours = data.Pictures(known, data.Transform((240,), 1333))
    theirs = bench.Pipeline(known, [240], 1333)
    theirs.transform.transforms[0].p = 0.0                   # no flip
    for i in range(len(known)):
        image, target = ours[0, i]
        their_image, their_target = theirs[i]
        assert image.shape == (3, 240, 320) and torch.equal(image, their_image)
        assert torch.allclose(target["boxes"], their_target["boxes"].as_subclass(torch.Tensor))
        assert torch.equal(target["labels"], their_target["labels"])
    assert len(known.boxes) > 3


def test_ours_and_the_peer_are_called_in_turn_and_the_ratio_is_a_median(monkeypatch):
    now, called = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    durations = {"ours": iter([9, 2, 6, 3]), "theirs": iter([9, 1, 2, 2])}

    def function(name):
        def run():
            called.append(name)
            now[0] += next(durations[name])
        return run

    row = bench.versus("both", function("ours"), "peer", function("theirs"))
    assert called == ["ours", "theirs"] * 4
    assert row == ("both", 3, "peer", 2, statistics.median([2 / 1, 6 / 2, 3 / 2]), "s")
    assert bench.told(row).split() == ["both", "3000.0", "ms", "peer", "2000.0", "ms", "2.00"]


@pytest.mark.parametrize("one_to_many", [True, False])
def test_a_step_leaves_gradients_and_its_matching_is_part_of_its_time(one_to_many):
    pictures = bench.batch("cpu", B=1, height=128, width=128)
    ours = bench.Ours("fcos", "cpu", one_to_many, pictures)
    took = bench.clock(lambda: ours.step(timed=True))
    assert 0 < ours.matching < took
    assert all(p.grad is not None for p in ours.model.parameters() if p.requires_grad)
    ours.infer()


def test_the_peers_step_learns_what_ours_does():
    """torchvision's FCOS has the same trainable weights, but for the classifier of a background."""
    from torchvision.models import detection
    theirs = bench.Torchvision(detection.fcos_resnet50_fpn, "cpu").model
    ours = bench.Ours("fcos", "cpu", True, variant="torchvision").model
    count = [sum(p.numel() for p in model.parameters() if p.requires_grad)
             for model in (ours, theirs)]
    assert count[0] == pytest.approx(count[1], rel=0.01)


def test_the_command_prints_and_writes_the_rows_of_the_parts_it_is_asked_for(
        tmp_path, command, monkeypatch):
    rows = [bench.Row("ours alone", 0.25), bench.Row("both", 0.002, "peer", 0.004, 0.5)]
    monkeypatch.setitem(bench.PARTS, "matching", lambda device: rows)
    code, out, err = command(bench, "matching", "--json", tmp_path / "bench.json")
    assert code == 0 and out.splitlines()[-2:] == [bench.told(row) for row in rows], err
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["part"], row["what"], row["ratio"]) for row in written["rows"]] == [
        ("matching", "ours alone", None), ("matching", "both", 0.5)]
    assert written["machine"]["device"] == "cpu"
    code, _, err = command(bench, "matchin")
    assert code == 2 and "no such part: matchin" in err
