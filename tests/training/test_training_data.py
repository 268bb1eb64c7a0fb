"""Crops and draws: functions of (seed, step, place), whole images only, fast."""

import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from idm_fast.images import read_luma
from idm_fast.outputs import InputError
from idm_fast.training import data
from idm_fast.training.data import GlobalBatches, RandomCrops, draw_step, transform


def test_draws_depend_on_seed_and_step_alone():
    again, same = draw_step(7, 3, (0.1, 0.5), 32), draw_step(7, 3, (0.1, 0.5), 32)
    assert (again.ratio, again.transform, again.network_seed) == (same.ratio, same.transform, same.network_seed)
    assert torch.equal(again.permutation, same.permutation)
    for other in (draw_step(7, 4, (0.1, 0.5), 32), draw_step(8, 3, (0.1, 0.5), 32)):
        assert not torch.equal(again.permutation, other.permutation) and again.network_seed != other.network_seed


def test_a_permutation_holds_every_pixel_once():
    permutation = draw_step(0, 0, (0.1,), 48).permutation
    assert permutation.dtype == torch.int64 and torch.equal(permutation.sort().values, torch.arange(48 * 48))


def test_ratios_and_transforms_are_drawn_evenly():
    draws = [draw_step(0, step, (0.1, 0.25, 0.5), 4) for step in range(2400)]
    ratios, transforms = Counter(d.ratio for d in draws), Counter(d.transform for d in draws)
    # Five standard deviations of a binomial count.
    assert all(abs(ratios[ratio] - 800) < 5 * (2400 * 1 / 3 * 2 / 3) ** 0.5 for ratio in (0.1, 0.25, 0.5))
    assert all(abs(transforms[mode] - 300) < 5 * (2400 * 1 / 8 * 7 / 8) ** 0.5 for mode in range(8))


def test_the_eight_transforms_are_the_symmetries_of_a_square():
    x = torch.arange(9.0).reshape(1, 3, 3)
    symmetries = [y.rot90(k, (1, 2)) for y in (x, x.transpose(1, 2)) for k in range(4)]
    images = [transform(x, mode) for mode in range(8)]
    assert all(sum(torch.equal(image, symmetry) for image in images) == 1 for symmetry in symmetries)


def test_a_crop_is_a_part_of_the_luma_of_an_image(photographs):
    crops = RandomCrops(photographs, 32, seed=0)
    lumas = [(read_luma(path) * 255).round().to(torch.uint8) for path in crops.paths]
    for sample in range(20):
        crop = crops[5, sample]
        assert crop.shape == (1, 32, 32) and crop.dtype == torch.uint8
        windows = [luma.unfold(0, 32, 1).unfold(1, 32, 1) for luma in lumas]
        assert any(bool((window == crop[0]).all(-1).all(-1).any()) for window in windows)


def test_every_image_and_every_position_is_drawn(tmp_path):
    Image.fromarray(np.arange(25, dtype=np.uint8).reshape(5, 5)).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4), 99, np.uint8)).save(tmp_path / "b.png")
    crops = RandomCrops(tmp_path, 4, seed=0)
    assert {int(crops[step, 0][0, 0, 0]) for step in range(100)} == {0, 1, 5, 6, 99}


def test_crops_are_the_same_with_and_without_the_cache(photographs, monkeypatch):
    cached = RandomCrops(photographs, 32, seed=1)
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    read_anew = RandomCrops(photographs, 32, seed=1)
    assert read_anew._lumas is None and cached._lumas is not None
    assert all(torch.equal(cached[0, sample], read_anew[0, sample]) for sample in range(8))


def test_worker_processes_load_the_same_batches(photographs):
    crops, places = RandomCrops(photographs, 32, seed=1), GlobalBatches(3, 7, batch=4)
    alone, helped = (list(DataLoader(crops, batch_sampler=places, num_workers=n)) for n in (0, 2))
    assert len(alone) == 4 and all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 3), (2, 2)])
def test_processes_and_parts_together_load_the_global_batch_once(processes, accumulation):
    batch = 3
    whole = [places for places in GlobalBatches(4, 6, batch * processes * accumulation)]
    shares = [
        list(GlobalBatches(4, 6, batch, accumulation, process, processes)) for process in range(processes)
    ]
    assert all(len(share) == 2 * accumulation for share in shares)
    for index, places in enumerate(whole):
        parts = range(index * accumulation, (index + 1) * accumulation)
        assert [place for part in parts for share in shares for place in share[part]] == places


def test_a_resumed_sampler_goes_on_where_the_other_would_be():
    assert list(GlobalBatches(5, 9, 2, 3)) == list(GlobalBatches(0, 9, 2, 3))[15:]


def test_small_images_are_left_out_and_counted(photographs):
    crops = RandomCrops(photographs, 36, seed=0)
    assert (crops.skipped, [path.name for path in crops.paths]) == (2, ["0.png", "3.png"])


def test_no_image_large_enough_is_an_error(photographs):
    with pytest.raises(InputError, match="all 4 images have a side below --resolution 128 .*short side is 64"):
        RandomCrops(photographs, 128, seed=0)


def test_subfolders_are_searched(tmp_path, photographs):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "deep" / "deeper" / "x.png").write_bytes((photographs / "3.png").read_bytes())
    assert len(RandomCrops(tmp_path, 32, seed=0)) == 1


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_a_broken_file_is_an_error_that_names_it(tmp_path, photographs, content):
    whole = (photographs / "3.png").read_bytes()
    (tmp_path / "good.png").write_bytes(whole)
    (tmp_path / "bad.png").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(InputError, match="bad.png"):
        RandomCrops(tmp_path, 32, seed=0)


def test_other_images_have_another_fingerprint(tmp_path, photographs):
    (tmp_path / "3.png").write_bytes((photographs / "3.png").read_bytes())
    assert RandomCrops(tmp_path, 32, 0).fingerprint != RandomCrops(photographs, 32, 0).fingerprint


def test_a_batch_of_128_pixel_crops_takes_less_than_10_ms(tmp_path):
    for number in range(4):
        Image.fromarray(np.full((320, 480), number, np.uint8)).save(tmp_path / f"{number}.png")
    batches = iter(DataLoader(RandomCrops(tmp_path, 128, 0), batch_sampler=GlobalBatches(0, 100, 16)))
    times = []
    for step in range(20):
        start = time.perf_counter()
        transform(next(batches), draw_step(0, step, (0.1,), 128).transform)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.010
