import json

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
