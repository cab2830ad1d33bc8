from dataclasses import replace

import pytest

from ssd_torchrec import doctor
from ssd_torchrec.doctor import Finding, Machine, Probed

CPU = Machine(driver=None, cuda=None, gpus=[], built_for=[], nccl=False)
H200 = Machine(driver="580.1", cuda="13.0", gpus=[("H200", (9, 0))], built_for=["sm_80", "sm_90"], nccl=True)
RAN = Probed(ok=True, output="cpu")
FAILED = Probed(ok=False, output="OSError: undefined symbol")


def stands(finding: Finding) -> bool:
    """Whether all is well; where it is not, a mend must be named, and only there."""
    assert bool(finding.mend) != finding.ok
    return finding.ok


@pytest.mark.parametrize(
    ("torch", "torchrec", "fbgemm"),
    [("2.13.0+cpu", "1.8.0", "1.8.0"), ("2.11.0+cu130", "1.6.1", "1.6.0"), ("2.13.0", "1.6.1", "1.8.0")],
    ids=["newer", "older", "older-torchrec"],
)
def test_supported_stacks_fit(torch, torchrec, fbgemm):
    assert stands(doctor.check_stack(torch, torchrec, fbgemm))


@pytest.mark.parametrize(
    ("torch", "torchrec", "fbgemm"),
    [("2.13.0", "1.8.0", "1.9.0"), ("2.11.0", "1.8.0", "1.8.0"), ("2.1.3", "1.8.0", "1.8.0"), ("2.13.0", None, None)],
    ids=["unpinned-fbgemm", "older-torch", "look-alike", "missing"],
)
def test_any_other_three_do_not_fit(torch, torchrec, fbgemm):
    finding = doctor.check_stack(torch, torchrec, fbgemm)
    assert not stands(finding)
    assert "2.13 / 1.8 / 1.8 or 2.11 / 1.6 / 1.6" in finding.mend


@pytest.mark.parametrize(("version", "ok"), [("3.10.13", False), ("3.11.7", True), ("3.13.0", True), ("3.14.0", False)])
def test_python_is_one_that_every_part_runs_on(version, ok):
    assert stands(doctor.check_python(version)) is ok


def test_two_builds_of_fbgemm_are_found_however_well_they_load():
    finding = doctor.check_fbgemm(["fbgemm-gpu", "fbgemm-gpu-cpu"], RAN, gpus=0)
    assert not stands(finding)
    assert finding.mend.startswith("pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu")


@pytest.mark.parametrize(
    ("builds", "probed", "gpus", "ok"),
    [
        pytest.param(["fbgemm-gpu-cpu"], RAN, 0, True, id="cpu-build-on-cpu"),
        pytest.param(["fbgemm-gpu-cpu"], RAN, 1, False, id="cpu-build-with-a-gpu"),
        pytest.param(["fbgemm-gpu"], Probed(ok=True, output="cuda"), 1, True, id="cuda-build-with-a-gpu"),
        pytest.param(["fbgemm-gpu"], FAILED, 0, False, id="does-not-load"),
        pytest.param([], FAILED, 0, False, id="missing"),
    ],
)
def test_fbgemm_must_load_and_serve_the_gpus(builds, probed, gpus, ok):
    assert stands(doctor.check_fbgemm(builds, probed, gpus)) is ok


@pytest.mark.parametrize(
    ("machine", "ok"),
    [
        pytest.param(CPU, True, id="no-gpu"),
        pytest.param(H200, True, id="gpu"),
        pytest.param(replace(CPU, driver="580.1"), False, id="driver-but-cpu-torch"),
        pytest.param(replace(H200, gpus=[]), False, id="driver-too-old-for-torch"),
        pytest.param(replace(H200, built_for=["sm_80"]), False, id="torch-without-code-for-it"),
    ],
)
def test_a_gpu_must_be_one_that_torch_can_use(machine, ok):
    assert stands(doctor.check_gpu(machine)) is ok


@pytest.mark.parametrize(
    ("arch", "built_for", "ok"),
    [
        ((8, 9), ["sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_100", "sm_120"], True),
        ((10, 3), ["sm_100a"], False),
        ((12, 0), ["compute_90"], True),
        ((8, 0), ["compute_90"], False),
        ((9, 0), [], False),
    ],
    ids=lambda case: "-".join(map(str, case)) if isinstance(case, tuple | list) else str(case),
)
def test_machine_code_runs_in_its_generation_and_ptx_on_anything_newer(arch, built_for, ok):
    assert doctor.runs_on(arch, built_for) is ok


@pytest.mark.parametrize(
    ("version", "probed", "gpus", "ok"),
    [
        pytest.param("3.7.1", RAN, 0, True, id="interpreter"),
        pytest.param("3.7.1", RAN, 1, True, id="compiles"),
        pytest.param("3.7.1", FAILED, 1, False, id="does-not-compile"),
        pytest.param(None, FAILED, 0, True, id="missing-without-a-gpu"),
        pytest.param(None, FAILED, 1, False, id="missing-with-a-gpu"),
    ],
)
def test_triton_must_compile_where_there_is_a_gpu(version, probed, gpus, ok):
    assert stands(doctor.check_triton(version, probed, gpus)) is ok


def test_processes_must_reach_each_other():
    assert stands(doctor.check_gloo(RAN))
    finding = doctor.check_gloo(FAILED)
    assert not stands(finding)
    assert "GLOO_SOCKET_IFNAME" in finding.mend


def test_nccl_is_missed_with_gpus_only():
    assert stands(doctor.check_nccl(CPU))
    assert stands(doctor.check_nccl(H200))
    assert not stands(doctor.check_nccl(replace(H200, nccl=False)))


def test_only_torchx_may_be_missing_of_the_packages():
    missing = doctor.check_packages({})
    assert [finding.name for finding in missing if stands(finding)] == ["torchx"]


def test_a_build_is_what_holds_files_so_that_the_shim_is_none(tmp_path, monkeypatch):
    for name, files in {"fbgemm-gpu-real": "fbgemm_gpu/part.py,,\n", "fbgemm-gpu-shim": ""}.items():
        info = tmp_path / f"{name.replace('-', '_')}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "RECORD").write_text(f"{files}{info.name}/METADATA,,\n")
    (tmp_path / "fbgemm_gpu").mkdir()
    (tmp_path / "fbgemm_gpu" / "part.py").touch()
    before = set(doctor.fbgemm_builds())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(doctor.fbgemm_builds()) - before == {"fbgemm-gpu-real"}


def test_a_probe_answers_with_its_last_line_or_its_error():
    probed = doctor.run_probes(
        {"prints": "Console().print('one\\ntwo')", "fails": "release(1)", "is silent": "release('1.2')"}
    )
    assert probed["prints"] == Probed(ok=True, output="two")
    assert not probed["fails"].ok
    assert probed["fails"].output.startswith("AttributeError")
    assert probed["is silent"].ok


def test_a_probe_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.1)
    (probed,) = doctor.run_probes({"alone": f"gloo_probe(0, {str(tmp_path / 'store')!r})"}).values()
    assert probed == Probed(ok=False, output="no answer within 0.1 s")


def test_this_installation_is_sound_and_its_probes_run():
    findings = {finding.name: finding for finding in doctor.look()}
    assert [name for name, finding in findings.items() if not stands(finding)] == []
    assert "variant" in findings["FBGEMM"].detail


def test_doctor_fails_and_prints_the_mend_when_something_is_off(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "look", lambda: [Finding("GPU", True, "none"), Finding("Stack", False, "no", "do [this]")]
    )
    assert doctor.run_doctor() == 1
    printed = capsys.readouterr().out
    assert "OFF" in printed
    assert "Stack: do [this]" in printed


def test_doctor_is_content_when_all_is_well(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "look", lambda: [Finding("GPU", True, "none")])
    assert doctor.run_doctor() == 0
    assert "OFF" not in capsys.readouterr().out
