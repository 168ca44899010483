"""What only Dreamer (v1) has, in float64 where numbers are compared: formulas against their definitions, what each loss
trains, which index meets which, how it explores and replays."""
import copy
import math
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import envs  # registers the toy environments
import gymnasium
import numpy as np
import pytest
import test_golden_dreamer_v1
import tiny
import torch
from conftest import load

v1 = load("dreamer_v1")
T, B, H, A = 5, 3, 4, 2
SIZES = dict(deter=8, hidden=7, stoch=4, cnn_depth=2, units=9, batch_length=T, imag_horizon=H, precision="fp32")
IMAGE = {"image": (64, 64, 3)}
OBJECTIVES = pytest.mark.parametrize("representation", ["reconstruction", "contrastive", "reward"])
DISCRETE = pytest.mark.parametrize("discrete", [True, False])


@pytest.fixture(autouse=True)
def double():
    """Float64 for everything, images and flags included."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_agent(discrete=False, **flags):
    """Small, with no parameter at a value such as 0 that hides a mistake."""
    torch.manual_seed(0)
    agent = v1.Agent(IMAGE, A, discrete, replace(v1.Args(), **{**SIZES, **flags}))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return agent


def make_rows(discrete=False):
    """Replay rows (T,B,...): column 0 begins an episode, column 1 ends one."""
    torch.manual_seed(1)
    flags = {name: torch.zeros(T, B, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")}
    flags["is_first"][0, 0] = True
    flags["is_last"][-1, 1] = True
    flags["is_terminal"][-1, 1] = True
    action = torch.randn(T, B, A).tanh()
    if discrete:
        action = torch.eye(A)[torch.randint(A, (T, B))]
    return dict(
        flags,
        image=torch.randint(256, (T, B, 64, 64, 3), dtype=torch.uint8),
        prev_action=action * ~flags["is_first"][..., None],
        reward=torch.randn(T, B),
    )


def reached(loss, module):
    """Names of the parameters that a loss trains."""
    names, parameters = zip(*module.named_parameters())
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name for name, grad in zip(names, grads) if grad is not None and bool(grad.abs().sum() > 0)}


def roots(names):
    """First parts of parameter names."""
    return {name.split(".")[0] for name in names}


# ---- formulas ----


def test_lambda_return_equals_its_definition():
    """The mixture of k-step returns, on numbers that are not symmetric in time."""
    torch.manual_seed(0)
    length, gamma = 6, 0.9
    reward, value = torch.randn(2, length, B)
    cont = torch.full((length, B), gamma)

    def k_step(t, k):
        rewards = sum(gamma**i * reward[t + i] for i in range(k))
        return rewards + gamma**k * value[t + k]

    for lam in (0.0, 0.7, 1.0):
        ours = v1.lambda_return(reward, value, cont, lam)
        for t in range(length - 1):
            left = length - 1 - t
            mixture = sum((1 - lam) * lam ** (k - 1) * k_step(t, k) for k in range(1, left))
            mixture = mixture + lam ** (left - 1) * k_step(t, left)
            assert torch.allclose(ours[t], mixture)


def test_free_nats_stop_both_sides_by_the_mean_of_the_batch():
    torch.manual_seed(0)
    stats = [torch.randn(T, B, 6).requires_grad_() for _ in range(2)]
    post, prior = map(v1.gaussian, stats)
    mean = v1.gaussian_kl(post, prior).mean().item()
    below, kl = v1.kl_loss(post, prior, mean + 1e-6)
    assert below.item() == pytest.approx(mean + 1e-6)
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(below, stats, retain_graph=True))
    above, _ = v1.kl_loss(post, prior, mean - 1e-6)  # elements below the mean are trained too
    assert all((grad.abs().sum(-1) > 0).all() for grad in torch.autograd.grad(above, stats))
    assert kl.min() < mean < kl.max()


def test_kl_is_that_of_torch():
    torch.manual_seed(0)
    p, q = (v1.gaussian(torch.randn(T, B, 6)) for _ in range(2))
    normals = (torch.distributions.Normal(*x) for x in (p, q))
    theirs = torch.distributions.kl_divergence(*normals).sum(-1)
    assert torch.allclose(v1.gaussian_kl(p, q), theirs)


def test_tanh_normal_is_a_distribution():
    """Its density over [-1, 1] integrates to one, and samples are distributed so."""
    torch.manual_seed(0)
    policy = v1.TanhNormal(torch.tensor([[0.7]]), torch.tensor([[-5.0]]))
    edges = torch.linspace(-0.999999, 0.999999, 200_001)
    density = policy.log_prob(edges[:, None, None]).exp()[:, 0]
    assert torch.trapezoid(density, edges).item() == pytest.approx(1, abs=1e-3)
    mean = torch.trapezoid(density * edges, edges)
    samples, _ = policy.draw(100_000)
    assert samples.mean().item() == pytest.approx(mean.item(), abs=0.01)


def test_new_actor_acts_near_the_bounds():
    torch.manual_seed(0)
    behaviour = v1.Behaviour(230, 6, False, v1.Args())
    action = behaviour.sample(torch.randn(2_000, 230))
    assert 0.55 < (action.abs() > 0.99).double().mean() < 0.65


def test_contrastive_objective_of_every_pair():
    """The density of each state under each image, one by one; sums over images, not over states."""
    torch.manual_seed(0)
    feat, mean = torch.randn(2, 7, 5)
    std = torch.rand(7, 5) + 0.01
    density = v1.pair_log_density(feat, mean, std)
    score = []
    for i in range(7):
        each = [torch.distributions.Normal(mean[j], std[j]).log_prob(feat[i]).sum() for j in range(7)]
        assert torch.allclose(density[i], torch.stack(each))
        score.append(each[i] - torch.stack(each).logsumexp(0))
    assert torch.allclose(v1.nce_loss(feat, mean, std), -torch.stack(score).mean())
    over_states = density.diagonal() - density.logsumexp(0)
    assert not torch.allclose(torch.stack(score), over_states)
    assert all(x <= 0 for x in score)  # the own image is in the sum


def test_pair_density_survives_sharp_states():
    """sigma 0.01 far from zero: in float32 the expanded square would be wrong by tens of nats."""
    torch.manual_seed(0)
    mean = 5 + torch.randn(6, 230)
    feat = mean + 0.01 * torch.randn(6, 230)
    std = torch.full((6, 230), 0.01)
    ours = v1.pair_log_density(feat.float(), mean.float(), std.float()).diagonal()
    exact = torch.distributions.Normal(mean.float(), std.float()).log_prob(feat.float()).sum(-1)
    assert torch.allclose(ours.double(), exact.double(), atol=0.01)


def test_adam_is_that_of_keras():
    """Two steps, written out for one number; the first gradient is cut to the allowed norm."""
    w = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = v1.Adam([w], lr=0.1, eps=0.01, clip=2.0)
    norms = [optimizer.step(w * grad) for grad in (5.0, -1.0)]
    assert [norm.item() for norm in norms] == [5.0, 1.0]
    expected, m, v = 1.0, 0.0, 0.0
    for k, grad in enumerate((2.0, -1.0), 1):
        m = 0.9 * m + 0.1 * grad
        v = 0.999 * v + 0.001 * grad**2
        expected -= 0.1 * math.sqrt(1 - 0.999**k) / (1 - 0.9**k) * m / (math.sqrt(v) + 0.01)
    assert w.item() == pytest.approx(expected, rel=1e-6)


# ---- what each loss trains ----


@OBJECTIVES
@pytest.mark.parametrize("pred_discount", [False, True])
def test_reach_of_the_world_model(representation, pred_discount):
    agent = make_agent(representation=representation, pred_discount=pred_discount, free_nats=0.0)
    losses, _, _ = agent.world.loss(make_rows())
    names = {name for name, _ in agent.world.named_parameters()}
    probe = {name for name in names if name.startswith("decoder")} if representation != "reconstruction" else set()
    model = reached(losses["model"], agent.world)
    # the last hidden layers of a head may have units that are off everywhere; every tensor has a gradient
    assert model == names - probe
    assert reached(losses["model"], agent.behaviour) == set()
    if probe:
        assert reached(losses["probe"], agent.world) == probe
    ours = {id(p) for p in agent.world.model_parameters()}
    assert ours == {id(p) for name, p in agent.world.named_parameters() if name not in probe}


@OBJECTIVES
def test_what_forms_the_representation(representation):
    """Without rewards to tell and without KL, only a word about images can train the encoder."""
    agent = make_agent(representation=representation, kl_scale=0.0)
    with torch.no_grad():
        agent.world.reward[-1].weight.zero_()  # the head's gradient ends here
    losses, _, _ = agent.world.loss(make_rows())
    assert ("encoder" in roots(reached(losses["model"], agent.world))) == (representation != "reward")


@DISCRETE
def test_reach_of_the_behaviour(discrete):
    agent = make_agent(discrete, pred_discount=True)
    _, post, _ = agent.world.loss(make_rows(discrete))
    losses, _ = agent.behaviour.loss(agent.world, post)
    assert not post["deter"].requires_grad and not post["stoch"].requires_grad
    assert roots(reached(losses["value"], agent.behaviour)) == {"critic"}
    assert reached(losses["value"], agent.world) == set()
    assert roots(reached(losses["policy"], agent.behaviour)) >= {"actor"}
    # through reward, discount and dynamics: what `train_step` then does not move
    through = roots(reached(losses["policy"], agent.world))
    assert through == {"rssm", "reward", "cont"}
    assert all(".posterior" not in name for name in reached(losses["policy"], agent.world))


def test_gradient_of_the_actor_loss_by_reward_and_value():
    """d loss / d r_k = -sum over t <= k of w_t (gamma lam)^(k-t) / count; of the last reward zero, of its value not."""
    agent = make_agent()
    reward, value = torch.randn(2, H, B, requires_grad=True)
    agent.world.predict_reward = lambda feat: reward
    agent.behaviour.critic.forward = lambda feat: value[..., None]
    target, weight = agent.behaviour.returns(agent.world, torch.zeros(H, B, 12))
    loss = agent.behaviour.actor_loss(target, weight)
    by_reward, by_value = torch.autograd.grad(loss, (reward, value))
    gamma, lam = agent.args.gamma, agent.args.lam
    for k in range(H - 1):
        expected = -sum(gamma**t * (gamma * lam) ** (k - t) for t in range(k + 1)) / ((H - 1) * B)
        assert torch.allclose(by_reward[k], torch.full((B,), expected))
    assert (by_reward[-1] == 0).all() and (by_value[-1] < 0).all()
    assert (by_value[0] == 0).all()  # the first state's value is no bootstrap of anything


def test_an_action_moves_later_states_but_not_the_view_of_later_actions():
    """The actor's gradient of one dream of two steps: the second action's own input is cut."""
    agent = make_agent(imag_horizon=2)
    seen = []
    original = agent.behaviour.sample
    agent.behaviour.sample = lambda feat: seen.append(feat) or original(feat)
    feat = agent.behaviour.imagine(agent.world.rssm, torch.randn(B, 8), torch.randn(B, 4))
    assert feat.shape == (2, B, 12) and feat[0].requires_grad
    assert len(seen) == 2 and not any(x.requires_grad for x in seen)
    assert torch.equal(seen[1], feat[0])


def test_discount_head_learns_gamma_of_what_goes_on():
    """A head that says gamma everywhere has no gradient on rows that go on, and too high a guess on a terminal one."""
    agent = make_agent(pred_discount=True, kl_scale=0.0)
    out = agent.world.cont[-1]
    with torch.no_grad():
        out.weight.zero_()
        out.bias.fill_(math.log(0.99 / 0.01))
    rows = make_rows()
    rows["is_terminal"][:] = False
    grad, = torch.autograd.grad(agent.world.loss(rows)[0]["model"], out.bias)
    assert abs(grad.item()) < 1e-9
    grad, = torch.autograd.grad(agent.world.loss(make_rows())[0]["model"], out.bias)
    assert grad.item() == pytest.approx(10 * 0.99 / (T * B))


def test_no_dream_begins_where_an_episode_may_have_ended():
    for flag, rows in ((True, T - 1), (False, T)):
        agent = make_agent(pred_discount=flag)
        counts = []
        agent.behaviour.imagine = lambda rssm, deter, stoch: counts.append(len(deter)) or torch.zeros(H, len(deter), 12)
        agent.behaviour.loss(agent.world, agent.world.loss(make_rows())[1])
        assert counts == [rows * B]


class Batch:
    """A replay that always samples the same rows."""

    def __init__(self, rows):
        self.rows = rows

    def sample(self, batch_size, length):
        return dict(self.rows)


@OBJECTIVES
def test_all_losses_see_the_same_weights(representation):
    """One update moves each part exactly as if it alone had been updated."""
    rows = make_rows()
    agent = make_agent(representation=representation, free_nats=0.0)
    alone = copy.deepcopy(agent)
    torch.manual_seed(5)
    v1.train_step(agent, v1.Optimizers(agent, agent.args), Batch(rows), B)

    for part in v1.Optimizers(alone, alone.args).state_dict():
        other = copy.deepcopy(alone)
        optimizer = v1.Optimizers(other, other.args)
        torch.manual_seed(5)
        model_losses, post, _ = other.world.loss(rows)
        losses, _ = other.behaviour.loss(other.world, post)
        loss = dict(model_losses, actor=losses["policy"], critic=losses["value"])[part]
        getattr(optimizer, part).step(loss)
        before, after, together = (dict(x.named_parameters()) for x in (alone, other, agent))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert all(torch.allclose(after[name], together[name], atol=1e-12) for name in moved)


# ---- time and noise ----


def test_noise_differs_between_sequences_and_dreams():
    """Three times the same sequence: one vector of noise for the whole batch would give three equal samples."""
    agent = make_agent()
    rows = {name: x[:, :1].expand(-1, B, *x.shape[2:]) for name, x in make_rows().items()}
    _, post, _ = agent.world.loss(rows)
    assert (post["stoch"][:, 0] - post["stoch"][:, 1]).abs().min() > 0
    feat = agent.behaviour.imagine(agent.world.rssm, torch.zeros(B, 8), torch.zeros(B, 4))
    assert (feat[:, 0] - feat[:, 1]).abs().max(-1).values.min() > 0


def without_noise(monkeypatch):
    monkeypatch.setattr(v1, "sample_normal", lambda mean, std: mean)


def test_acting_is_observing(monkeypatch):
    """The policy, step by step over two episodes, has the states that `observe` computes at once."""
    without_noise(monkeypatch)
    agent = make_agent().eval()
    rows = make_rows()
    rows["is_first"][:] = False
    rows["is_first"][[0, 3]] = True
    state = agent.initial(B)
    states, actions = [], [state["action"]]
    for t in range(T):
        state = agent.act({name: x[t].numpy() for name, x in rows.items()}, state)
        states.append(state)
        actions.append(state["action"])
    start = agent.initial(B)
    with torch.no_grad():
        deter, stoch, _ = agent.world.rssm.observe(
            agent.world.encoder(rows), torch.stack(actions[:-1]), rows["is_first"], start["deter"], start["stoch"])
    assert torch.allclose(torch.stack([state["deter"] for state in states]), deter)
    assert torch.allclose(torch.stack([state["stoch"] for state in states]), stoch)


def test_memory_begins_anew_in_each_episode(monkeypatch):
    without_noise(monkeypatch)
    agent = make_agent()
    rows = make_rows()
    rows["is_first"][2] = True
    tokens = agent.world.encoder(rows)
    zero = torch.zeros(B, 8), torch.zeros(B, 4)
    whole, _, _ = agent.world.rssm.observe(tokens, rows["prev_action"], rows["is_first"], *zero)
    first = torch.zeros(T - 2, B, dtype=torch.bool)
    action = rows["prev_action"][2:].clone()
    action[0] = 0
    part, _, _ = agent.world.rssm.observe(tokens[2:], action, first, *zero)
    assert torch.allclose(whole[2:], part)


def test_action_before_a_sequence_counts():
    """Unlike in DreamerV2: the first row of a sequence is no beginning of an episode."""
    agent = make_agent()
    rows = make_rows()
    deters = []
    for action in (0.5, -0.5):
        rows["prev_action"][0] = action
        deters.append(agent.world.loss(rows)[1]["deter"][0])
    difference = (deters[0] - deters[1]).abs().sum(-1)
    assert difference[0] == 0 and (difference[1:] > 0).all()  # column 0 begins an episode


def test_exploration():
    torch.manual_seed(0)
    behaviour = v1.Behaviour(12, 2, False, v1.Args(units=4))
    action = behaviour.explore(torch.zeros(100_000, 2))
    assert action.std().item() == pytest.approx(0.3, rel=0.02)
    assert behaviour.explore(torch.ones(1_000, 2)).max() == 1
    greedy = torch.eye(4)[torch.zeros(100_000, dtype=torch.long)]
    behaviour = v1.Behaviour(12, 4, True, v1.Args(units=4))
    for updates, eps in ((0, 0.4), (100_000, 0.25), (400_000, 0.1)):
        behaviour.updates.fill_(updates)
        action = behaviour.explore(greedy)
        assert (action.sum(-1) == 1).all()
        assert (action[:, 0] == 0).double().mean().item() == pytest.approx(0.75 * eps, abs=0.01)


def test_evaluation_acts_with_the_mode_and_without_noise():
    agent = make_agent(True).eval()
    feat = torch.randn(50, 12)
    policy = agent.behaviour.policy(feat)
    assert torch.equal(agent.behaviour.sample(feat).argmax(-1), policy.argmax(-1))
    torch.set_default_dtype(torch.float32)  # the density's cut is one of float32
    policy = v1.TanhNormal(torch.tensor([[0.3, -0.2]] * 50), torch.full((50, 2), -7.0))
    behaviour = v1.Behaviour(12, 2, False, v1.Args(units=4)).eval()
    behaviour.policy = lambda feat: policy
    spread = (behaviour.sample(feat) - policy.rsample().mean(0)).abs().mean()
    assert spread < 0.5 * policy.rsample().std(0).mean()


# ---- replay and environment ----


def make_replay(lengths, capacity=100, length=T, folder=None):
    """One stream of episodes of so many rows; the action tells the row's number."""
    folder = Path(folder or tempfile.mkdtemp())
    specs = v1.replay_specs({"image": (2, 2, 1)}, 1)
    replay = v1.Replay(specs, capacity, 1, folder, torch.device("cpu"), length=length)
    number = 0
    for rows in lengths:
        for t in range(rows):
            last = t == rows - 1
            replay.add(dict(
                image=np.full((1, 2, 2, 1), number, np.uint8), reward=np.array([number]), is_first=np.array([t == 0]),
                is_last=np.array([last]), is_terminal=np.array([last]), action=np.full((1, 1), number + 0.5)))
            number += 1
    return replay


def test_sequences_reach_the_last_row_and_stay_in_one_episode():
    torch.manual_seed(0)
    replay = make_replay([8, 4, 11])
    batch = replay.sample(40_000, T)
    reward = batch["reward"].long()
    assert torch.equal(reward, reward[0] + torch.arange(T)[:, None])
    starts = reward[0].bincount(minlength=23) / 40_000
    expected = torch.zeros(23)
    expected[0:4] = 1 / 2 / 4  # 8 rows have 4 starts of 5 rows, each episode has half
    expected[12:19] = 1 / 2 / 7
    assert torch.allclose(starts, expected, atol=0.01)
    assert batch["is_terminal"][-1, reward[0] == 3].all() and batch["is_terminal"].any(0).double().mean() > 0.1
    # the action that led to a row is the row's before; none led to a first row
    assert torch.equal(batch["prev_action"][..., 0], torch.where(batch["is_first"], 0, reward - 0.5).float())
    assert torch.equal(batch["is_first"], (reward == 0) | (reward == 12))


def test_episode_of_just_the_length_is_replayed():
    replay = make_replay([5])
    assert torch.equal(replay.sample(3, T)["reward"][:, 0], torch.arange(5.0, dtype=torch.float32))


def test_rows_tell_the_action_that_led_to_them():
    """An environment whose image shows the last action, through acting, storing and sampling."""
    torch.set_default_dtype(torch.float32)
    name = "ScriptedContinuous-v0"
    if name not in gymnasium.registry:
        gymnasium.register(name, entry_point=envs.Scripted, kwargs=dict(image=True, continuous=True))
    args = v1.Args(**SIZES, env_id=name, action_repeat=1)
    made = v1.make_envs(args, 1, 0)
    agent = v1.Agent(made.shapes, made.action_dim, made.discrete, args)
    replay = v1.Replay(
        v1.replay_specs(made.shapes, 1), 100, 1, Path(tempfile.mkdtemp()), torch.device("cpu"), length=T)
    row, state = made.reset(), agent.initial(1)
    for _ in range(40):
        state = agent.act(row, state)
        state["action"][torch.as_tensor(row["is_last"])] = 0
        replay.add(row | state)
        row = made.step(state["action"].numpy())
    batch = replay.sample(200, T)
    code = batch["image"][:, :, 0, 0, 1].float()
    shown = torch.where(batch["is_first"], 0, 128 + 127 * batch["prev_action"][..., 0])
    assert (code - shown).abs().max() <= 0.51
    assert torch.equal(batch["reward"], batch["image"][:, :, 0, 0, 0].float())  # of arrival
    assert code[batch["is_first"]].numel() > 0 and code.std() > 10


def test_atari_joystick():
    """-1 and +1 are the bounds of radius, angle and fire, in the number format that ale-py asserts."""
    made = v1.make_envs(v1.Args(action_repeat=4), 1, 0)
    assert made.action_dim == 3 and not made.discrete and made.shapes["image"] == (64, 64, 3)
    native = made.native(np.array([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]))
    assert native.dtype == np.float32
    assert np.allclose(native, [[0, -np.pi, 0], [1, np.pi, 1]])
    assert (native >= made.action_space.low).all() and (native <= made.action_space.high).all()
    made.reset()
    assert made.step(np.ones((1, 3)))["image"].std() > 0
    assert v1.make_envs(v1.Args(action_repeat=4, continuous=False), 1, 0).discrete


def test_pendulum_is_rendered():
    made = v1.make_envs(v1.Args(env_id="Pendulum-v1", action_repeat=1), 1, 0)
    first, second = made.reset(), made.step(np.ones((1, 1)))
    assert first["image"].shape == (1, 64, 64, 3) and (first["image"] != second["image"]).any()
    assert np.allclose(made.native(np.array([[-1.0], [1.0]])), [[-2], [2]])


def test_control_suite():
    """A task of dm_control: rendered at 64x64, two frames per step, ended by time alone."""
    if not (find_spec("dm_control") and find_spec("shimmy")):  # importing them would be too early for MUJOCO_GL
        pytest.skip("shimmy[dm-control] is not installed")
    args = v1.parse_args(["--env-id", "dm_control/cartpole-balance-v0", "--device", "cpu"])
    assert args.action_repeat == 2
    made = v1.make_envs(args, 1, 0)
    row = made.reset()
    assert row["image"].shape == (1, 64, 64, 3) and row["image"].std() > 1
    steps = 0
    while not row["is_last"][0]:
        row = made.step(np.zeros((1, made.action_dim)))
        steps += 1
    assert steps == 500 and not row["is_terminal"][0]
    assert made.ret[0] > 10


def test_control_suite_missing(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "shimmy", None)
    with pytest.raises(SystemExit) as error:
        v1.make_envs(v1.Args(env_id="dm_control/walker-walk-v0", action_repeat=2), 1, 0)
    assert error.value.code == 2 and "mujoco==3.17.0" in capfd.readouterr().err


@pytest.mark.parametrize("env_id, repeat", [
    ("dm_control/walker-walk-v0", 2), ("shimmy:dm_control/walker-walk-v0", 2), ("ALE/Pong-v5", 4), ("Pendulum-v1", 1)])
def test_action_repeat_by_default(env_id, repeat):
    assert v1.parse_args(["--env-id", env_id]).action_repeat == repeat
    assert v1.parse_args(["--env-id", env_id, "--action-repeat", "3"]).action_repeat == 3


# ---- what is refused ----


@pytest.mark.parametrize("flag", ["deter", "hidden", "stoch", "cnn-depth", "units"])
def test_sizes_that_cannot_work(flag, capfd):
    with pytest.raises(SystemExit) as error:
        v1.parse_args([f"--{flag}=-1"])
    assert error.value.code == 2 and f"--{flag} must be positive" in capfd.readouterr().err


def test_updates_that_are_owed_wait_for_an_episode(tmp_path):
    """After a resume that may replay nothing: all rows are at risk."""
    torch.set_default_dtype(torch.float32)
    run = tiny.run("dreamer_v1", tmp_path, eval_episodes=0)
    saved = tiny.checkpoint(run)
    torch.save({**saved, "debt": 3, "at_risk": 10**6}, run / "checkpoint.pt")
    tiny.call("dreamer_v1", ["--resume", str(run), "--total-timesteps=48"])
    assert tiny.checkpoint(run)["updates"] > saved["updates"]


@pytest.mark.parametrize("before, after", [("reward", "reconstruction"), ("reconstruction", "reward")])
def test_another_representation_on_resume(before, after, tmp_path, capfd):
    """The networks are the same, but not what trains the decoder."""
    torch.set_default_dtype(torch.float32)
    run = tiny.run("dreamer_v1", tmp_path, representation=before, eval_episodes=0)
    with pytest.raises(SystemExit) as error:
        tiny.call("dreamer_v1", ["--resume", str(run), "--representation", after, "--total-timesteps", "40"])
    assert error.value.code == 2 and "--representation" in capfd.readouterr().err


# ---- breakages ----



def method(owner, name, change):
    """A breakage that replaces owner.name, given the module, by change(original)."""
    def patch(monkeypatch, module):
        target = getattr(module, owner) if owner else module
        monkeypatch.setattr(target, name, change(getattr(target, name)))
    return patch


def in_double(test, *args):
    """Run a test as its fixture would."""
    def run():
        torch.set_default_dtype(torch.float64)
        try:
            test(*args)
        finally:
            torch.set_default_dtype(torch.float32)
    return run


def one_noise(original):
    """The official code's draw: one vector for the whole batch."""
    return lambda mean, std: mean + std * torch.randn(mean.shape[-1:])


def late_action(original):
    """The action chosen on a row, instead of the one that led to it."""
    def sample(self, batch_size, length):
        batch = original(self, batch_size, length)
        batch["prev_action"] = batch["prev_action"].roll(-1, 0)
        return batch
    return sample


def early_start(original):
    """The official start index: never an episode's last row."""
    def sample(self, batch_size, length):
        kept = self.episodes
        self.episodes = [(first, rows - 1, env) for first, rows, env in kept if rows > length]
        batch = original(self, batch_size, length)
        self.episodes = kept
        return batch
    return sample


def short_bootstrap(original):
    """The first code's slip: the value before the last one."""
    def lambda_return(reward, value, cont, lam):
        return original(reward, torch.cat([value[:-1], value[-2:-1]]), cont, lam)
    return lambda_return


def over_states(original):
    """The released contrastive sum."""
    return lambda feat, mean, std: -(
        (density := v1.pair_log_density(feat, mean, std)).diagonal() - density.logsumexp(0)).mean()


def attached(original):
    """The probe's gradient reaches the representation."""
    def image_loss(self, deter, stoch, rows):
        image = v1.normal_nll(self.decoder(deter, stoch), rows["image"] / 255 - 0.5)
        return image.flatten(2).sum(-1).mean()
    return image_loss


def no_reset(original):
    """Memory goes on from episode to episode."""
    def observe(self, tokens, prev_action, is_first, deter, stoch):
        return original(self, tokens, prev_action, torch.zeros_like(is_first), deter, stoch)
    return observe


def each_step(original):
    """Free nats for each state instead of the mean."""
    def kl_loss(post, prior, free_nats):
        kl = v1.gaussian_kl(post, prior)
        return kl.clamp(min=free_nats).mean(), kl.detach()
    return kl_loss


FREE = in_double(test_free_nats_stop_both_sides_by_the_mean_of_the_batch)
MUTATIONS = {  # name: (patch(monkeypatch, module), test that must fail)
    "one noise for the batch": (
        method("", "sample_normal", one_noise), in_double(test_noise_differs_between_sequences_and_dreams)),
    "action of the same row": (
        method("Replay", "sample", late_action), in_double(test_sequences_reach_the_last_row_and_stay_in_one_episode)),
    "last rows never replayed": (
        method("Replay", "sample", early_start), in_double(test_sequences_reach_the_last_row_and_stay_in_one_episode)),
    "bootstrap one state early": (
        method("", "lambda_return", short_bootstrap), in_double(test_lambda_return_equals_its_definition)),
    "contrast over states": (
        method("", "nce_loss", over_states), in_double(test_contrastive_objective_of_every_pair)),
    "probe forms the representation": (
        method("WorldModel", "image_loss", attached), in_double(test_reach_of_the_world_model, "reward", False)),
    "no reset": (method("RSSM", "observe", no_reset), in_double(test_action_before_a_sequence_counts)),
    "free nats per state": (method("", "kl_loss", each_step), FREE),
}
