"""The command line: what it writes, and that everything a user can get wrong is one line, exit code 2 and no file."""

import csv
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from idm_fast import pretrained
from idm_fast.cli import main
from idm_fast.commands import network
from idm_fast.images import read_image, read_luma
from idm_fast.measurements import Measurements
from idm_fast.models.idm import IDM
from idm_fast.ops import registry


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network so small that these tests take seconds; trained for nothing, but it says for 0.1 and 0.25."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    options = {"widths": (16, 32), "heads": 2, "norm_groups": 8, "attention": (False, True)}
    model = IDM(steps=1, **options, trained_ratios=[0.1, 0.25], block_size=16, sensing_seed=3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    """50×70 in colour."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def refused(capsys, out, message, *arguments):
    """The command ends with code 2, one line on stderr that holds `message`, and writes nothing."""
    try:
        code = main([str(argument) for argument in (*arguments, "--output_dir", out)])
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.count("\n") == 1 and printed.err.startswith("idm-fast") and "error:" in printed.err
    assert message in printed.err
    assert printed.out == "" and not out.exists()


# reconstruct


def test_reconstruct_writes_a_gray_png_of_the_images_size(capsys, weights, photo, out):
    assert main(["reconstruct", str(photo), "--weights", str(weights), "--output_dir", str(out)]) == 0
    assert names(out) == ["photo_idm.png"]
    picture = Image.open(out / "photo_idm.png")
    assert picture.mode == "L" and picture.size == (70, 50)
    printed = capsys.readouterr().out
    assert "photo.png" in printed and "ratio 0.1" in printed and "PSNR" in printed and "SSIM" in printed


def test_reconstruct_is_sensing_then_the_network(weights, photo, out):
    main(["reconstruct", str(photo), "--weights", str(weights), "--output_dir", str(out), "--save_measurements"])
    measurements = Measurements.load(out / "photo_measurements.npz")
    assert (measurements.ratio, measurements.block_size, measurements.seed) == (0.1, 16, 3)
    padded = torch.nn.functional.pad(read_luma(photo), (0, 10, 0, 14))[None, None]
    physics = measurements.physics()
    torch.testing.assert_close(measurements.y, physics.A(padded))
    with torch.no_grad():
        expected = IDM.from_pretrained(weights).eval()(physics.A(padded), physics)[0, 0, :50, :70].clamp(0, 1)
    torch.testing.assert_close(read_luma(out / "photo_idm.png"), expected, atol=0.51 / 255, rtol=0)


@pytest.mark.parametrize("channels", ["y", "rgb"])
def test_measurements_alone_give_the_same_picture(weights, photo, out, tmp_path, channels):
    flags = ["--weights", str(weights), "--compare"]
    first = ["reconstruct", str(photo), *flags, "--output_dir", str(out), "--channels", channels]
    assert main([*first, "--cs_ratio", "0.25", "--seed", "9", "--save_measurements"]) == 0
    assert names(out) == ["photo_comparison.png", "photo_idm.png", "photo_measurements.npz"]
    photo.unlink()
    again = tmp_path / "again"
    assert main(["reconstruct", str(out / "photo_measurements.npz"), *flags, "--output_dir", str(again)]) == 0
    assert names(again) == ["photo_comparison.png", "photo_idm.png"]
    assert (again / "photo_idm.png").read_bytes() == (out / "photo_idm.png").read_bytes()
    assert Image.open(out / "photo_idm.png").mode == {"y": "L", "rgb": "RGB"}[channels]


def test_each_colour_channel_is_reconstructed_for_itself(weights, photo, out, tmp_path):
    main(["reconstruct", str(photo), "--weights", str(weights), "--channels", "rgb", "--output_dir", str(out)])
    colour = read_image(out / "photo_idm.png", "rgb")
    for index, channel in enumerate(Image.open(photo).split()):
        gray = tmp_path / f"channel{index}.png"
        channel.save(gray)
        main(["reconstruct", str(gray), "--weights", str(weights), "--output_dir", str(out)])
        torch.testing.assert_close(read_luma(out / f"channel{index}_idm.png"), colour[index], atol=1.01 / 255, rtol=0)


def test_folders_and_files_are_taken_together(weights, photo, out, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.jpg", "b.bmp"):
        Image.open(photo).save(folder / name)
    arguments = ["reconstruct", str(folder), str(photo), str(folder / "a.jpg"), "--weights", str(weights)]
    assert main([*arguments, "--output_dir", str(out)]) == 0
    assert names(out) == ["a_idm.png", "b_idm.png", "photo_idm.png"]


def test_a_second_run_replaces_the_results(weights, photo, out):
    for seed in ("1", "2"):
        arguments = ["reconstruct", str(photo), "--weights", str(weights), "--seed", seed, "--save_measurements"]
        assert main([*arguments, "--output_dir", str(out)]) == 0
    assert Measurements.load(out / "photo_measurements.npz").seed == 2
    assert names(out) == ["photo_idm.png", "photo_measurements.npz"]


def test_default_weights_are_those_of_the_package(monkeypatch, capsys, weights, photo, out, tmp_path):
    monkeypatch.setattr(pretrained, "DEFAULT_WEIGHTS", tmp_path / "none")
    refused(capsys, out, "pass --weights", "reconstruct", photo)
    monkeypatch.setattr(pretrained, "DEFAULT_WEIGHTS", weights)
    assert main(["reconstruct", str(photo), "--output_dir", str(out)]) == 0


def test_any_ratio_overrides_what_the_weights_were_trained_for(capsys, weights, photo, out):
    arguments = ["reconstruct", photo, "--weights", weights, "--cs_ratio", "0.5"]
    refused(capsys, out, "trained for 0.1, 0.25", *arguments)
    refused(capsys, out, "trained for 16", "reconstruct", photo, "--weights", weights, "--block_size", "32")
    overridden = [*map(str, arguments), "--any_ratio", "--block_size", "32", "--output_dir", str(out)]
    assert main(overridden) == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cs_ratio", "0"], "outside (0, 1]"),
        (["--cs_ratio", "1.01"], "outside (0, 1]"),
        (["--cs_ratio", "-0.1"], "outside (0, 1]"),
        (["--cs_ratio", "nan"], "outside (0, 1]"),
        (["--cs_ratio", "ten"], "'ten' is no number"),
        (["--step_number", "3"], "trained for 1 steps, and --step_number is 3"),
        (["--step_number", "0"], "not positive"),
        (["--block_size", "30"], "multiple of 4"),
        (["--seed", "-1"], "is not in 0"),
        (["--channels", "ycbcr"], "invalid choice"),
        (["--impl", "magic"], "'magic' is none of auto, cuda, triton, cpu, reference"),
        (["--impl", "no_such_file.json"], "no_such_file.json: No such file"),
        (["--no_such_flag"], "unrecognized arguments"),
    ],
)
def test_bad_flags(capsys, weights, photo, out, flags, message):
    refused(capsys, out, message, "reconstruct", photo, "--weights", weights, *flags)


def test_an_implementation_for_another_device_is_refused_before_any_work(capsys, weights, photo, out, monkeypatch):
    monkeypatch.setattr(network, "choose_device", lambda name: "cuda")
    before = registry.current_choice()
    if reason := registry.load("cpu"):
        pytest.skip(reason)
    try:
        refused(capsys, out, "no kernels for device cuda", "reconstruct", photo, "--weights", weights, "--impl", "cpu")
    finally:
        registry.use(before)


@pytest.fixture
def choice(tmp_path):
    """Writes a choice op by op into a file, whose path it returns; afterwards the choice is what it was."""
    before, path = registry.current_choice(), tmp_path / "fastest.json"

    def write(**names):
        path.write_text(json.dumps({"ops": names}))
        return path

    yield write
    registry.use(before)


def test_a_choice_op_by_op_is_taken_from_a_file(weights, photo, out, choice):
    flags = ["--weights", weights, "--output_dir", out, "--impl", choice(geglu="reference", gram="reference")]
    assert main(["reconstruct", str(photo), *map(str, flags)]) == 0
    assert registry.OPS["gram"].named_in(registry.current_choice()) == "reference"
    assert registry.OPS["couple"].named_in(registry.current_choice()) is None


def test_a_choice_op_by_op_with_an_op_for_another_device_is_refused(capsys, weights, photo, out, choice, monkeypatch):
    monkeypatch.setitem(registry.OPS["geglu"].implementations, "cuda", (lambda h: h, ("cuda",)))
    monkeypatch.setattr(registry, "load", lambda name: None)
    flags = ["--weights", weights, "--impl", choice(geglu="cuda", gram="reference")]
    refused(capsys, out, "no kernels for device cpu", "reconstruct", photo, *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu_and_implementations_that_are_not_here(capsys, weights, photo, out):
    refused(capsys, out, "no CUDA device", "reconstruct", photo, "--weights", weights, "--device", "cuda")
    refused(capsys, out, "--impl cuda", "reconstruct", photo, "--weights", weights, "--impl", "cuda")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.png", b"no image", "not an image"),
        ("a.png", b"", "0 bytes"),
        ("a.npz", b"no archive", "damaged or no .npz"),
        ("a.npz", b"", "0 bytes"),
    ],
)
def test_bad_files_are_found_before_the_good_ones_are_worked_on(
    capsys, weights, photo, out, tmp_path, name, content, message
):
    (tmp_path / name).write_bytes(content)
    refused(capsys, out, message, "reconstruct", photo, tmp_path / name, "--weights", weights)


def test_truncated_missing_and_small_images(capsys, weights, photo, out, tmp_path):
    whole = photo.read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (200, 15)).save(tmp_path / "small.png")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("cut.png", "cannot be read"),
        ("none.png", "does not exist"),
        ("small.png", "15×200"),
        ("empty", "holds no images"),
    ]:
        refused(capsys, out, message, "reconstruct", photo, tmp_path / name, "--weights", weights)


def test_bad_measurements(capsys, weights, photo, out, tmp_path):
    main(["reconstruct", str(photo), "--weights", str(weights), "--save_measurements", "--output_dir", str(tmp_path)])
    capsys.readouterr()
    path = tmp_path / "photo_measurements.npz"
    good = dict(np.load(path))
    for changes, message in [
        ({"y": good["y"] * np.inf}, "NaN or infinite"),
        ({"y": good["y"][:, :, :-1]}, "y has shape"),
        ({"ratio": 0.5, "y": np.zeros((1, 20, 128), np.float32)}, "trained for 0.1, 0.25"),
    ]:
        np.savez(path, **{**good, **changes})
        refused(capsys, out, message, "reconstruct", path, "--weights", weights)
    np.savez(path, **good)
    flags = ["--cs_ratio", "0.1", "--seed", "1"]
    refused(capsys, out, "--cs_ratio, --seed", "reconstruct", path, "--weights", weights, *flags)


def test_names_that_would_collide(capsys, weights, photo, out, tmp_path):
    Image.open(photo).save(tmp_path / "photo.bmp")
    refused(capsys, out, "photo_idm.png", "reconstruct", photo, tmp_path / "photo.bmp", "--weights", weights)


def test_results_never_overwrite_an_input(capsys, weights, photo, tmp_path):
    shutil.copy(photo, tmp_path / "photo_idm.png")
    before = (tmp_path / "photo_idm.png").read_bytes()
    both = [str(photo), str(tmp_path / "photo_idm.png")]
    assert main(["reconstruct", *both, "--weights", str(weights), "--output_dir", str(tmp_path)]) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert (tmp_path / "photo_idm.png").read_bytes() == before


@pytest.mark.parametrize("command", ["reconstruct", "evaluate"])
def test_unwritable_output(capsys, weights, photo, tmp_path, command):
    blocked = tmp_path / "file"
    blocked.write_text("")
    images = [str(photo)] if command == "reconstruct" else ["--data_dir", str(photo.parent)]
    assert main([command, *images, "--weights", str(weights), "--output_dir", str(blocked / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot write" in error


def test_a_full_disk_leaves_no_half_written_file(monkeypatch, capsys, weights, photo, out):
    def full(self, file, *args, **kwargs):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert main(["reconstruct", str(photo), "--weights", str(weights), "--output_dir", str(out)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_zero_byte_weights(capsys, weights, photo, out, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(weights, copy)
    (copy / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    refused(capsys, out, "0 bytes", "reconstruct", photo, "--weights", copy)
    refused(capsys, out, "0 bytes", "evaluate", "--data_dir", tmp_path, "--weights", copy)


def test_nan_from_the_network_is_said_and_not_written(monkeypatch, capsys, weights, photo, out):
    monkeypatch.setattr(IDM, "forward", lambda self, y, physics: physics.A_adjoint(y) * float("nan"))
    assert main(["reconstruct", str(photo), "--weights", str(weights), "--output_dir", str(out)]) == 2
    assert "NaN" in capsys.readouterr().err and list(out.iterdir()) == []


# evaluate


@pytest.fixture
def dataset(tmp_path):
    random = np.random.default_rng(1)
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name, size in [("b.png", (32, 48)), ("a.tif", (40, 33))]:
        Image.fromarray(random.integers(0, 256, size, np.uint8)).save(folder / name)
    return folder


def test_evaluate_writes_what_it_prints(capsys, weights, dataset, out):
    flags = ["--weights", str(weights), "--output_dir", str(out), "--save_images"]
    assert main(["evaluate", "--data_dir", str(dataset), *flags]) == 0
    printed = capsys.readouterr().out
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["ratio"]) for row in rows] == [
        ("a.tif", "0.1"), ("b.png", "0.1"), ("a.tif", "0.25"), ("b.png", "0.25"),
    ]
    for row in rows:
        assert f"{float(row['psnr']):.2f}" in printed and f"{float(row['ssim']):.4f}" in printed
    document = json.loads((out / "results.json").read_text())
    assert document["settings"]["seed"] == 3 and document["settings"]["block_size"] == 16
    mean = np.mean([float(row["psnr"]) for row in rows[:2]])
    assert document["averages"]["0.1"]["psnr"] == pytest.approx(mean)
    assert f"{mean:.2f}" in printed and "average" in printed
    pictures = [f"ratio_{r}/{n}_{k}.png" for r in ("0.1", "0.25") for n in "ab" for k in ("comparison", "idm")]
    assert names(out) == sorted([*pictures, "results.csv", "results.json"])


def test_evaluate_is_the_protocol(weights, dataset, out):
    from idm_fast.evaluation.protocol import evaluate

    flags = ["--weights", str(weights), "--output_dir", str(out), "--cs_ratio", "0.25", "--seed", "8"]
    assert main(["evaluate", "--data_dir", str(dataset), *flags]) == 0
    model = IDM.from_pretrained(weights)
    expected = evaluate(model, [dataset / "a.tif", dataset / "b.png"], 0.25, 16, 8)
    images = json.loads((out / "results.json").read_text())["images"]
    assert [image["psnr"] for image in images] == pytest.approx([result.psnr for result in expected], abs=1e-4)


def test_evaluate_refuses_before_any_work(capsys, weights, dataset, out, tmp_path):
    (tmp_path / "empty").mkdir()
    start = ["evaluate", "--weights", weights, "--data_dir"]
    refused(capsys, out, "holds no images", *start, tmp_path / "empty")
    refused(capsys, out, "does not exist", *start, tmp_path / "nothing")
    refused(capsys, out, "trained for", *start, dataset, "--cs_ratio", "0.1", "0.7")
    refused(capsys, out, "outside (0, 1]", *start, dataset, "--cs_ratio", "0.1", "2")
    shutil.copy(dataset / "b.png", dataset / "b.bmp")
    refused(capsys, out, "under one name", *start, dataset, "--save_images")
    (dataset / "c.png").write_bytes(b"no image")
    refused(capsys, out, "not an image", *start, dataset)


# doctor, help, train


def test_doctor_reports_versions_devices_and_every_op(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch         {importlib.metadata.version('torch')}" in printed and "threads" in printed
    for op in ("couple", "project_step", "measure", "inject_read", "group_norm_silu", "geglu"):
        assert f"  {op} " in printed
    assert "broken" not in printed


def test_doctor_names_what_is_missing_and_why(monkeypatch, capsys):
    from idm_fast.ops import native, registry

    monkeypatch.setattr(native, "load_cpu", lambda: "no C++ compiler was found")
    monkeypatch.setattr(registry, "load_triton", lambda: "Triton is not installed")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "cpu is missing: no C++ compiler was found" in printed and "triton is missing: Triton is not installed" in printed


def test_output_that_nobody_reads_to_its_end_is_no_error():
    doctor = f"{sys.executable} -m idm_fast.cli doctor"
    done = subprocess.run(f"{doctor} | head -1", shell=True, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("versions\n", "")


def test_doctor_goes_on_when_a_part_is_broken(monkeypatch, capsys):
    from idm_fast.commands import doctor

    monkeypatch.setattr(doctor, "_devices", lambda: 1 / 0)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "broken: ZeroDivisionError" in printed and "measure" in printed


def test_doctor_says_how_to_choose_on_a_gpu(monkeypatch):
    from idm_fast.commands import doctor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert any("bench --device cuda --quick --only kernels" in line for line in doctor._operations())
    with registry.use("reference"):
        assert not any("--only kernels" in line for line in doctor._operations()), "a choice was made"


@pytest.mark.parametrize("command", ["train", "reconstruct", "evaluate"])
def test_help_has_examples_and_defaults(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and f"idm-fast {command}" in printed and "default:" in printed


def test_help_is_fast_and_imports_no_torch():
    code = "import sys, idm_fast.cli; idm_fast.cli.build_parser(); print({'torch', 'PIL'} & set(sys.modules))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
    assert time.perf_counter() - start < 1.5


def test_environment_variable_that_cannot_be_met(photo, out):
    command = [sys.executable, "-m", "idm_fast.cli", "reconstruct", str(photo), "--output_dir", str(out)]
    environment = {**os.environ, "IDM_FAST_IMPL": "magic"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "IDM_FAST_IMPL=magic" in done.stderr


def test_train_refuses_bad_input_in_one_line(capsys, out, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(capsys, out, "holds no images", "train", "--train_data_dir", tmp_path / "empty")
    refused(capsys, out, "--train_data_dir", "train", "--train_data_dir", tmp_path / "nothing")
    refused(capsys, out, "--cs_ratio", "train", "--train_data_dir", tmp_path / "empty", "--cs_ratio", "1.5")


def test_what_train_writes_reconstructs(weights, out, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(2)
    for index in range(2):
        Image.fromarray(random.integers(0, 256, (40, 40), np.uint8)).save(folder / f"{index}.png")
    arguments = ["--train_data_dir", str(folder), "--output_dir", str(tmp_path / "trained"), "--resolution", "32"]
    start = ["--pretrained_model_name_or_path", str(weights), "--step_number", "1", "--block_size", "16"]
    assert main(["train", *arguments, *start, "--train_batch_size", "1", "--max_train_steps", "1"]) == 0
    trained = ["--weights", str(tmp_path / "trained"), "--output_dir", str(out)]
    assert main(["reconstruct", str(folder), *trained]) == 0
    assert names(out) == ["0_idm.png", "1_idm.png"]


# bench


def test_bench_runs_the_suite_of_the_checkout_with_its_options_and_exit_code(monkeypatch, capsys):
    from idm_fast.commands import bench

    commands = []

    def run(command, env, check):
        commands.append(command[1:])
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(bench.subprocess, "run", run)
    with pytest.raises(SystemExit) as error:
        main(["bench", "--quick", "--only", "kernels"])
    assert error.value.code == 1
    assert commands == [["-m", "benchmarks", "--quick", "--only", "kernels"]]


def test_bench_without_a_checkout_says_where_the_suite_is(monkeypatch, tmp_path, capsys):
    import idm_fast

    monkeypatch.setattr(idm_fast, "__file__", str(tmp_path / "site" / "idm_fast" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench"]) == 2
    assert "checkout" in capsys.readouterr().err
