"""Storage of each script: ring, files, deterministic writes, disk."""

import shutil

import pytest
import tiny
import torch
from conftest import SCRIPTS, load

NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)
CPU = torch.device("cpu")
SPECS = dict(x=((), torch.float32), y=((3,), torch.uint8))


def storage(name: str, folder, capacity: int = 5, num_envs: int = 2, **options):
    return load(name).Storage(SPECS, capacity, num_envs, folder, CPU, **options)


def fill(made, count: int) -> None:
    for _ in range(count):
        row = made.rows
        made.add(dict(x=torch.arange(made.num_envs) + 10.0 * row, y=torch.full((made.num_envs, 3), row)))


@each_script
def test_ring(name, tmp_path):
    made = storage(name, tmp_path)
    fill(made, 7)
    assert (made.rows, made.size) == (7, 5)
    batch = made.gather(torch.tensor([[2, 6], [3, 6]]), torch.tensor([0, 1]))
    assert batch["x"].tolist() == [[20, 61], [30, 61]]
    assert batch["y"][:, :, 0].tolist() == [[2, 6], [3, 6]]


@pytest.mark.parametrize("name", ["dreamer_v3", "dllm"])  # the files that write latents back
def test_the_last_of_overlapping_sequences_wins(name, tmp_path):
    """On positions that several sequences share, in every order, whatever the number of threads."""
    made = load(name).Replay(SPECS, 50, 2, tmp_path, CPU)
    fill(made, 50)
    torch.manual_seed(0)
    for _ in range(20):
        start = torch.randint(0, 20, (30,))
        env = torch.randint(2, (30,))
        index = (start + torch.arange(8)[:, None]) * 2 + env
        value = torch.rand(8, 30)
        made.write(index, x=value)
        expected = {}
        for b in range(30):
            for t in range(8):
                expected[int(index[t, b])] = float(value[t, b])
        found = made.data["x"].flatten()
        assert all(float(found[position]) == number for position, number in expected.items())


@each_script
def test_files_hold_the_rows(name, tmp_path):
    made = storage(name, tmp_path)
    fill(made, 4)
    again = storage(name, tmp_path, new=False)
    again.load_state_dict(made.state_dict(), lost=0)
    assert (again.rows, again.size) == (4, 4)
    assert torch.equal(again.data["x"], made.data["x"])


@each_script
def test_rows_that_may_be_overwritten_do_not_count(name, tmp_path):
    made = storage(name, tmp_path)
    fill(made, 7)
    again = storage(name, tmp_path, new=False)
    again.load_state_dict(made.state_dict(), lost=2)
    assert (again.rows, again.size) == (7, 3)


@each_script
@pytest.mark.parametrize("damage", ["missing", "short", "other sizes"])
def test_damaged_files(name, damage, tmp_path, capfd):
    storage(name, tmp_path)
    if damage == "missing":
        (tmp_path / "x.bin").unlink()
    if damage == "short":
        (tmp_path / "x.bin").write_bytes(b"1234")
    with pytest.raises(SystemExit) as end:
        storage(name, tmp_path, capacity=6 if damage == "other sizes" else 5, new=False)
    assert end.value.code == 2
    assert "x.bin" in capfd.readouterr().err


@each_script
def test_too_small_a_disk(name, tmp_path, monkeypatch, capfd):
    script = load(name)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 1000))
    script.check_disk(tmp_path, SPECS, 100)  # 7 bytes a row
    with pytest.raises(SystemExit):
        script.check_disk(tmp_path, SPECS, 200)
    assert "--buffer-size" in capfd.readouterr().err


@each_script
def test_all_policy_steps_fit_if_the_buffer_is_larger_than_the_budget(name, tmp_path):
    """Episodes of few steps fill replay with rows of resets too: half of all with one step each."""
    short = dict(env_id="envs:CatchSmall-v0", batch_length=3)
    if name == "genrl":  # needs whole clips of 8 frames
        short = dict(env_id="envs:Catch-v0")
    run = tiny.run(name, tmp_path, total_timesteps=90, eval_episodes=0, **short)
    saved = tiny.checkpoint(run)
    assert saved["step"] == 90
    assert saved["replay"]["rows"] >= 90 + (12 if name == "genrl" else 29)
    assert saved["capacity"] >= saved["replay"]["rows"]
    assert saved["capacity"] >= 2 * 90
    assert (~tiny.replay_field(run, "is_first")).sum() == 90
