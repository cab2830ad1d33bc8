import json
from pathlib import Path

import pytest

from ssd_torchrec.__main__ import COMMANDS, main


def test_no_words_list_the_commands(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_an_unknown_command_is_refused_with_the_list(capsys):
    assert main(["trian"]) == 2
    complaint = capsys.readouterr().err
    assert "no command 'trian'" in complaint
    assert "train" in complaint


def test_what_we_refuse_ends_in_a_message_and_no_traceback(capsys, tmp_path):
    assert main(["train", "tim4rec", "--data.path", str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("ssd-torchrec train: DataError:")
    assert "meta.json" in complaint
    assert not list(tmp_path.iterdir())  # nothing is made for a run that cannot begin


def test_a_checkpoint_that_is_none_is_refused(capsys, tmp_path):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "must be a checkpoint or a run that has one" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert COMMANDS[command].about.split(".")[0].split(",")[0] in " ".join(capsys.readouterr().out.split())


def test_help_of_a_preset_shows_fields_with_their_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "tim4rec", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--training.epochs" in shown
    assert "--encoder.time-mode" in shown
    assert "--sharding.optimizer" in shown


def test_generate_writes_a_data_set_and_says_how_large(capsys, tmp_path):
    folder = tmp_path / "small"
    assert main(["generate", str(folder), "--law.num-users", "50"]) == 0
    assert "50 users" in capsys.readouterr().out
    assert json.loads((folder / "meta.json").read_text())["num_users"] == 50


def test_prepare_shows_its_steps_and_what_to_type_next(capsys, tmp_path):
    lines = [f"{user}::{item}::5::{978300000 + 60 * item}" for user in range(1, 7) for item in range(1, 7)]
    (tmp_path / "ratings.dat").write_text("\n".join([*lines, "9::1::5::978300000", ""]))
    output = tmp_path / "set"
    assert main(["prepare", str(tmp_path), "--output", str(output), "--preset", "ml-1m", "--num-oov-buckets", "3"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[0] == ["users", "items", "interactions", "seconds"]
    assert shown[1][:4] == ["log", "7", "6", "37"]
    assert shown[2][:6] == ["5-core,", "round", "1", "6", "6", "36"]
    assert shown[3][:5] == ["data", "set", "6", "6", "36"]
    assert shown[-1][-2:] == ["--data.path", str(output)]
    meta = json.loads((output / "meta.json").read_text())
    assert (meta["name"], meta["num_oov_buckets"]) == ("ml-1m", 3)


def test_an_unknown_preset_of_a_log_is_refused_with_the_list(capsys, tmp_path):
    assert main(["prepare", "log", "--output", str(tmp_path / "set"), "--preset=ml-3m"]) == 2
    assert "--preset must be one of ml-1m, " in capsys.readouterr().err


def test_help_of_prepare_shows_presets_and_what_a_preset_sets(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--preset", "kuairand-pure", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "ratings.dat" in shown
    assert "(default: video_id)" in shown
    assert "--k-core" in shown


SMALL = {"encoder.width": 16, "encoder.head-width": 8, "encoder.state": 8, "training.warmup-steps": 1}


def trained(data: Path, folder: Path, options: dict) -> dict:
    given = {"data.path": data, "output": folder.parent, "name": folder.name, **SMALL, **options}
    assert (
        main(["train", "tim4rec", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]) == 0
    )
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_a_run_goes_through_one_file_and_on_as_if_it_had_not(capsys, tmp_path):
    data, first, file, back = (tmp_path / name for name in ("data", "first", "whole.safetensors", "back"))
    assert main(["generate", str(data), "--law.num-users", "40"]) == 0
    result = trained(data, first, {"training.epochs": 1, "dense.learning-rate": 1e-6})
    capsys.readouterr()
    assert main(["unshard", str(first), str(file)]) == 0
    assert "whole.safetensors: step " in capsys.readouterr().out
    assert main(["unshard", str(first), str(file)]) == 2
    assert "must not be there yet" in capsys.readouterr().err
    assert main(["unshard", str(first), str(file), "--replace"]) == 0
    assert main(["reshard", str(file), str(back), "--ranks", "3"]) == 0
    assert "world size 3, tables with the state of adam, the rest with that of adam" in capsys.readouterr().out
    assert main(["evaluate", str(back)]) == 0
    assert f"{result['test']['ndcg@10']:.4f}" in capsys.readouterr().out
    more = [
        trained(data, tmp_path / f"from-{of.name}", {"training.epochs": 4, "training.resume": of})
        for of in (first, back)
    ]
    assert more[0]["best_epoch"] > 1
    assert [more[1][stage] for stage in ("valid", "test")] == [more[0][stage] for stage in ("valid", "test")]
