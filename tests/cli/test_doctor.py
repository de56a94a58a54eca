"""The report on this machine, and on machines with the faults that users bring."""

import json
import subprocess
import sys

import pytest

from megatron_7b.cli.commands import doctor
from megatron_7b.runtime.machine import examination
from megatron_7b.runtime.machine.import_probe import Outcome, probe_imports
from tests.support.assets import REPOSITORY

HEALTHY = {
    "torch": Outcome(True, None, {"version": "2.14.1+cu130", "cuda": "13.0"}),
    "megatron.core": Outcome(True, None),
    "megatron_7b.data._index": Outcome(True, None, {"file": "_index.so"}),
    "megatron_7b.runtime._kernels": Outcome(True, None, {"file": "_kernels.so"}),
    "transformer_engine.pytorch": Outcome(False, "not installed"),
    "apex.multi_tensor_apply": Outcome(False, "not installed"),
}


@pytest.fixture
def examine(monkeypatch):
    """Findings on a machine whose imports and package versions differ from a healthy one's as told."""

    def examine_machine(versions=None, **outcomes):
        found = HEALTHY | {name.replace("__", "."): outcome for name, outcome in outcomes.items()}
        real_version = examination._version
        monkeypatch.setattr(examination, "probe_imports", lambda _: found)
        monkeypatch.setattr(
            examination, "_version", lambda package: {**(versions or {})}.get(package, real_version(package))
        )
        return {finding.name: finding for finding in examination.examine_machine(1.0)}

    return examine_machine


def test_this_machine_for_real():
    """The same environment runs these tests, so what they need has to be found."""
    command = [sys.executable, "-m", "megatron_7b", "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=250)
    report = json.loads(result.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    for name in ("python", "torch", "megatron-core", "data extension", "tokenizers"):
        assert checks[name]["status"] == "ok", checks[name]
    assert checks["python"]["detail"].startswith(sys.version.split()[0])
    assert {"gpu", "transformer-engine", "apex", "slurm", "disk", "memory", "gigatoken"} <= set(checks)
    assert (report["ok"], result.returncode) == (True, 0)


def test_what_is_broken_and_required_decides_the_exit_code(examine, capsys):
    examine(torch=Outcome(False, "No module named 'torch'"))
    assert doctor.main([]) == 1
    report = capsys.readouterr().out
    assert 'to fix: pip install "torch>=2.11"' in report
    assert "not ready" in report
    examine(transformer_engine__pytorch=Outcome(True, "ImportError: libcudart.so.13"))
    assert doctor.main([]) == 0
    assert "broken  transformer-engine" in capsys.readouterr().out


def test_an_old_resiliency_extension_is_named_as_the_culprit(examine, monkeypatch):
    monkeypatch.setattr(examination.device_facts, "glibc_version", lambda: (2, 36))
    error = "AttributeError: module 'nvidia_resiliency_ext' has no attribute '__version__'"
    found = examine({"nvidia-resiliency-ext": "0.4.1"}, megatron__core=Outcome(True, error))
    for name in ("megatron-core", "nvidia-resiliency-ext"):
        assert (found[name].status, found[name].required) == ("broken", True)
        assert found[name].remedy == "pip uninstall -y nvidia-resiliency-ext"
    assert "0.5 needs glibc 2.39, here is 2.36" in found["nvidia-resiliency-ext"].detail
    monkeypatch.setattr(examination.device_facts, "glibc_version", lambda: (2, 39))
    assert "0.5" in examine({"nvidia-resiliency-ext": "0.4.1"})["nvidia-resiliency-ext"].remedy
    assert examine({"nvidia-resiliency-ext": "0.6.0"})["nvidia-resiliency-ext"].status == "ok"


def test_versions_that_do_not_fit(examine):
    found = examine({"megatron-core": "0.18.2"}, torch=Outcome(True, None, {"version": "2.9.1", "cuda": None}))
    assert (found["torch"].status, found["megatron-core"].status) == ("broken", "broken")
    assert "2.11 or later" in found["torch"].detail
    assert "CPU only" in found["torch"].detail


def test_the_other_apex_is_told_apart(examine):
    assert examine()["apex"].status == "absent"
    assert "not NVIDIA's" in examine({"apex": "0.9.10.dev0"})["apex"].detail


def test_a_missing_extension_without_a_compiler_starts_with_the_compiler(examine, monkeypatch):
    monkeypatch.setattr(examination.shutil, "which", lambda _: None)
    found = examine(megatron_7b__data___index=Outcome(False, "No module named 'megatron_7b.data._index'"))
    assert found["data extension"].remedy.startswith("install a C++ compiler")
    assert found["kernel extension"].status == "ok"
    assert found["slurm"].status == "absent"


def test_probing_survives_crashes_hangs_and_absence(tmp_path, monkeypatch):
    (tmp_path / "crashes.py").write_text("import os; os.abort()")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(600)")
    (tmp_path / "raises.py").write_text("raise RuntimeError('driver too old')")
    (tmp_path / "works.py").write_text("__version__ = '1.2'\nprint('noise')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    modules = ("works", "crashes", "raises", "hangs", "absent_module", "absent_package.module")
    outcomes = probe_imports(3.0, modules)
    assert list(outcomes) == list(modules)
    assert outcomes["works"].facts["version"] == "1.2"
    assert outcomes["crashes"].error == "the import ended the process with code -6"
    assert outcomes["raises"].error == "RuntimeError: driver too old"
    assert outcomes["hangs"].error == "the import took more than 3 seconds"
    assert [outcomes[name].found for name in modules] == [True, True, True, True, False, False]
