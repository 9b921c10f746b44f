"""What launchers put into the environment, read; and where the tasks of a Slurm step meet."""

import os

import pytest

from seqengine.errors import InputError
from seqengine.launch.environment import Processes, prepare_rendezvous, read_processes

TASK = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_STEP_NODELIST": "gpu[3-4,9]",
    "SLURM_JOB_NODELIST": "gpu[1-9]",
}
MEETS = ("MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly these variables, of those that launchers set; what the code under test sets goes again, too."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *MEETS):
            monkeypatch.delenv(name)
    for name in MEETS:
        monkeypatch.setenv(name, "")

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield set_all
    os.environ.clear()
    os.environ.update(before)


def without(*names):
    return {name: value for name, value in TASK.items() if name not in names}


def test_a_slurm_task_has_the_rank_of_its_step(environment):
    environment(TASK)
    assert read_processes() == Processes(5, 7, 1, 3, launched=True)


def test_tasks_per_node_may_come_from_the_job_or_be_one_number(environment, monkeypatch):
    environment(without("SLURM_STEP_TASKS_PER_NODE") | {"SLURM_NTASKS_PER_NODE": "2"})
    assert read_processes() == Processes(5, 7, 1, 2, launched=True)
    monkeypatch.setenv("SLURM_PROCID", "6")
    monkeypatch.setenv("SLURM_NODEID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    assert read_processes() == Processes(6, 7, 0, 1, launched=True)
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "3(x2),1")
    monkeypatch.setenv("SLURM_NODEID", "2")
    assert read_processes() == Processes(6, 7, 0, 1, launched=True)


def test_torchruns_variables_come_first(environment):
    environment({**TASK, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    assert read_processes() == Processes(1, 2, 1, 2, launched=True)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        without("SLURM_STEP_ID"),
        without("SLURM_PROCID"),
        {**TASK, "SLURM_STEP_ID": "4294967290"},
        {**TASK, "SLURM_STEP_ID": "4294967291"},
        {**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
    ids=["nothing", "batch script", "salloc", "interactive step", "batch step", "step of one task"],
)
def test_a_shell_of_slurm_has_launched_nothing(environment, variables):
    environment(variables)
    assert read_processes() == Processes()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**TASK, "SLURM_LOCALID": "x"}, "SLURM_LOCALID must be a number in a Slurm step; got 'x'"),
        (without("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"), "SLURM_STEP_NUM_TASKS must be a number"),
        ({**TASK, "SLURM_PROCID": "2"}, "got rank 2 as task 1 of node 2. Start with srun --distribution=block"),
        ({**TASK, "SLURM_NODEID": "3"}, r"must be those of the step; got \[2, 2, 3\] on node 3 of 7 tasks"),
        ({**TASK, "SLURM_STEP_TASKS_PER_NODE": "2,two"}, "must read as in 4.x2.,3; got '2,two'"),
        ({"RANK": "1"}, "RANK, WORLD_SIZE, LOCAL_RANK must all be set by the launcher; got WORLD_SIZE=None"),
    ],
)
def test_an_environment_that_does_not_fit_is_named(environment, variables, message):
    environment(variables)
    with pytest.raises(InputError, match=message):
        read_processes()


def scontrol(folder, monkeypatch, script):
    (folder / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_tasks_meet_at_the_first_node_of_their_step(environment, monkeypatch, tmp_path):
    environment(TASK)
    scontrol(tmp_path, monkeypatch, 'test "$*" = "show hostnames gpu[3-4,9]" && printf "gpu3\\ngpu4\\ngpu9\\n"')
    prepare_rendezvous(read_processes())
    assert [os.environ[name] for name in MEETS] == ["gpu3", str(10000 + (16 * 12345 + 2) % 20000)]


def test_a_name_without_brackets_needs_no_scontrol(environment, monkeypatch, tmp_path):
    environment({**TASK, "SLURM_STEP_NODELIST": "gpu3"})
    scontrol(tmp_path, monkeypatch, "exit 1")
    prepare_rendezvous(read_processes())
    assert os.environ["MASTER_ADDR"] == "gpu3"


def test_a_meeting_place_that_was_named_stands(environment):
    environment({**TASK, "MASTER_ADDR": "here", "MASTER_PORT": "7"})
    prepare_rendezvous(read_processes())
    assert [os.environ[name] for name in MEETS] == ["here", "7"]


def test_one_process_meets_nobody(environment):
    environment({})
    prepare_rendezvous(read_processes())
    assert [os.environ[name] for name in MEETS] == ["", ""]


@pytest.mark.parametrize(("script", "message"), [("exit 3", "exit status 3"), ("true", "finds no node")])
def test_nodes_that_cannot_be_named_are_an_input_error(environment, monkeypatch, tmp_path, script, message):
    environment(TASK)
    scontrol(tmp_path, monkeypatch, script)
    with pytest.raises(InputError, match=message):
        prepare_rendezvous(read_processes())


def test_a_launcher_that_names_no_meeting_place_is_told(environment):
    environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here"})
    with pytest.raises(InputError, match="MASTER_ADDR and MASTER_PORT must be set by the launcher; MASTER_PORT is not"):
        prepare_rendezvous(read_processes())
