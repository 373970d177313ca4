"""Which backend isolates, and hosts that offer none."""

import json
import os
import shutil
from pathlib import Path

import pytest
from processes import descendants
from sandbox_attacks import FAKES
from sandbox_cases import assert_contained, assert_not_faked, body, gone

from espo_lightning import evaluate, fit
from espo_lightning.tasks.sandbox import run as sandbox
from espo_lightning.tasks.sandbox.run import Sandbox, SandboxUnavailable

NO_LAYERS = """

def absent(*args):
    raise OSError(38, "not on this host")

enter_namespaces = mount_private = landlock = drop_capabilities = seccomp = absent
LAYERS = (enter_namespaces, mount_private, landlock, drop_capabilities, seccomp)
"""
DOORS = ("start processes", "signal others", "use the network", "list files", "read files", "change permissions")
# What limits, kills and the separation of program and tests contain without help from the system.
CONTAINED_ANYWHERE = (
    *("infinite loop", "sleep", "ignored signals", "memory bomb", "mmap bomb", "one large file", "output flood"),
    *("deep recursion", "deeper recursion", "os._exit", "environment", "a thread that outlives main", "thread bomb"),
    *("closing every descriptor", "a bomb of threads with small stacks"),
)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A host that offers nothing: no bubblewrap, and every layer refused by the kernel."""
    for path in sandbox.INNER:
        shutil.copy(path, tmp_path)
    with open(tmp_path / "isolation.py", "a") as file:
        file.write(NO_LAYERS)
    monkeypatch.setattr(sandbox, "INNER", [str(tmp_path / Path(path).name) for path in sandbox.INNER])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sandbox._choose.cache_clear()
    yield
    sandbox._choose.cache_clear()


@pytest.fixture
def unsafe(bare):
    with pytest.warns(UserWarning, match="UNSAFE SANDBOX"):
        pool = Sandbox(2, allow_unsafe=True)
    yield pool
    pool.close()


@pytest.mark.usefixtures("bare")
def test_refuses_without_isolation():
    with pytest.raises(SandboxUnavailable, match="allow_unsafe=true") as caught:
        Sandbox()
    assert "bwrap: not on PATH" in str(caught.value)
    assert "not on this host" in str(caught.value)


@pytest.mark.usefixtures("bare")
def test_the_warning_says_what_is_not_contained():
    with pytest.warns(UserWarning, match="UNSAFE SANDBOX.*bwrap: not on PATH; stdlib: .*not on this host") as caught:
        pool = Sandbox(1, allow_unsafe=True)
    assert pool.backend == "unsafe"
    assert [door for door in DOORS if door not in str(caught[0].message)] == []


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(("main", "prefix"), [(fit.main, "data."), (evaluate.main, "")], ids=["fit", "evaluate"])
def test_a_run_that_cannot_verify_ends_before_it_starts(main, prefix, tmp_path, monkeypatch, capsys):
    """One message, nothing written; with the choice of the unsafe sandbox it runs, after the warning."""
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    rows = Path(__file__).parent / "data" / "mbpp_60.jsonl"
    flags = [f"--{prefix}task=MBPP", f"--{prefix}task.path={rows}"]
    if main is fit.main:
        flags += ["--data.eval_problems=2", "--data.eval_batch_size=2", "--data.batches=1", "--data.batch_size=1"]
        flags += ["--model.group_size=2", "--trainer.accelerator=cpu", "--run_dir=."]
    else:
        flags += ["--problems=2", "--output=result.json", "--decoding.length=16"]
    with pytest.raises(SystemExit) as error:
        main(flags)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert "no isolation for model-written code on this host (bwrap: not on PATH; stdlib: " in printed
    assert "allow_unsafe=true" in printed
    assert "Traceback" not in printed
    assert list(folder.iterdir()) == []
    with pytest.warns(UserWarning, match="UNSAFE SANDBOX"):
        main([*flags, f"--{prefix}task.allow_unsafe=true"])
    assert list(folder.iterdir())


@pytest.mark.parametrize("escape", CONTAINED_ANYWHERE)
def test_contained_without_isolation(unsafe, escape, monkeypatch):
    assert_contained(unsafe, escape, monkeypatch)


@pytest.mark.parametrize("fake", FAKES)
def test_cannot_fake_a_result_without_isolation(unsafe, fake):
    assert_not_faked(unsafe, fake)


def test_daemons_die_without_isolation(unsafe):
    """Forks are not refused there but killed, in sessions of their own too; what they left in the directory is gone."""
    source = """
        import os, signal, time
        for index in range(20):
            if os.fork() == 0:
                if index % 2: os.setsid()
                if index % 3: signal.signal(15, signal.SIG_IGN)
                if os.fork() == 0 or index % 5:
                    time.sleep(60)
                os._exit(0)
        os.makedirs('a/b'); open('a/b/c', 'w'); os.symlink('/etc/passwd', 'l')
        print('forked')
        """
    before = descendants(os.getpid())
    assert unsafe.run(body(source)).stdout == "forked\n"
    assert unsafe.run("import os\nprint(os.listdir('.'))").stdout == "[]\n"
    unsafe.close()
    assert gone(lambda: descendants(os.getpid()) - before) == set()
    assert Path("/etc/passwd").exists()


@pytest.mark.usefixtures("bare")
def test_the_probe_sees_every_open_door(monkeypatch):
    """Whatever a backend claims, one open door ends its choice."""
    result = sandbox._probe("unsafe")
    assert [door for door in DOORS if door not in result.stdout] == []
    assert result.status == "crash"  # the last door is to become another program
    monkeypatch.setattr(sandbox, "PROBE", sandbox.PROBE.replace('is_open(os.execv, "/bin/true", ["true"])', ""))
    assert sandbox.probe("unsafe").startswith("unsafe: error: AssertionError: a program can start processes, signal")


def test_results_are_plain_data():
    result = sandbox.Result("ok", (True,), "", "", 0.0)
    assert json.loads(json.dumps(result)) == ["ok", [True], "", "", 0.0]
