"""twm.py against numbers of the official implementation (jrobine/twm at e6a8e59, its missing latent loss repaired).

Weights and large inputs are not stored: `hashed(name, shape)` makes them from a name, as they were made then. Arrays of
the official code are batch first, ours time first."""

import functools
import zlib

import numpy as np
import pytest
import torch
from conftest import golden, load

m = load("twm")
G = golden("twm")
F64 = dict(dtype=torch.float64)


# ---- the hash that stands for weights and inputs ----
def uniform(name: str, *shape: int) -> np.ndarray:
    """splitmix64 of (crc32(name), index), in [0, 1)."""
    index = np.arange(np.prod(shape, dtype=int), dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = np.uint64(zlib.crc32(name.encode()) << 32) + index + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return ((x >> np.uint64(11)) / 2.0**53).reshape(shape)


def hashed(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(2 * uniform(name, *shape) - 1)


def filled(name: str, shape: tuple) -> torch.Tensor:
    """The weight of that official name."""
    x = hashed(name, *shape)
    if name.endswith(("u_bias", "v_bias", "embeds.a.weight")):
        return x
    if len(shape) == 1:
        return 1 + 0.1 * x if "norm" in name and name.endswith("weight") else 0.1 * x
    inputs = np.prod(shape[1:])
    if "conv_transpose" in name:
        inputs = shape[0] * shape[-1] ** 2 / 4
    return x * np.sqrt(3 / inputs)


def numbered(name: str) -> str:
    """Place of a linear layer in a Sequential of linear, SiLU and dropout."""
    kind, number, leaf = name.rpartition("linear")[0], *name.rpartition("linear")[2].split(".")
    return f"{kind}{3 * (int(number) - 1)}.{leaf}"


def ours(official: str) -> str:
    """Our name of an official parameter, without the prefix of the small nets."""
    name = official
    replacements = {
        "wm.obs_model.encoder.0.conv": "world.encoder.convs.",
        "wm.obs_model.encoder.2.": "world.encoder.mlp.",
        "wm.obs_model.decoder.0.linear1": "world.decoder.dense",
        "wm.obs_model.decoder.2.conv_transpose": "world.decoder.convs.",
        "wm.dyn_model.prediction_net.": "world.dynamics.",
        "embeds.z.linear1": "in_latent",
        "embeds.a": "in_action",
        "embeds.r.linear1": "in_reward",
        "u_bias": "u",
        "v_bias": "v",
        "self_attn.qkv_proj": "attention.qkv",
        "self_attn.pos_proj": "attention.position",
        "self_attn.out_proj": "attention.out",
        "out_heads.z": "latent",
        "out_heads.r": "reward",
        "out_heads.g": "cont",
        "ac.actor_model": "behaviour.actor",
        "ac.critic_model": "behaviour.critic",
    }
    for theirs, here in replacements.items():
        name = name.replace(theirs, here)
    if ".convs." in name:
        head, number, leaf = name.rsplit(".", 2)
        name = f"{head}.{int(number) - 1}.{leaf}"
    if "linear" in name and ".layers." not in name:
        name = numbered(name)
    return name


def official_names(heads: int, layers: int, ac: int) -> list[str]:
    """Names of all official parameters, for that many layers of heads, Transformer, and actor and critic."""
    net = "wm.dyn_model.prediction_net"
    names = [f"wm.obs_model.encoder.0.conv{i}" for i in range(1, 5)]
    names += [f"wm.obs_model.encoder.2.linear{i}" for i in range(1, 4)]
    names += ["wm.obs_model.decoder.0.linear1"]
    names += [f"wm.obs_model.decoder.2.conv_transpose{i}" for i in range(1, 5)]
    names += [f"{net}.embeds.z.linear1", f"{net}.embeds.r.linear1"]
    for i in range(layers):
        names += [f"{net}.transformer.layers.{i}.{part}" for part in ("linear1", "linear2", "norm1", "norm2")]
    names += [f"{net}.out_heads.{head}.linear{i}" for head in "zrg" for i in range(1, heads + 2)]
    names += [f"ac.{part}_model.linear{i}" for part in ("actor", "critic") for i in range(1, ac + 2)]
    names = [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]
    for i in range(layers):
        parts = ("qkv_proj", "pos_proj", "out_proj")
        names += [f"{net}.transformer.layers.{i}.self_attn.{part}.weight" for part in parts]
    return names + [f"{net}.embeds.a.weight", f"{net}.transformer.u_bias", f"{net}.transformer.v_bias"]


def fill(agent, prefix: str, names: list[str]) -> None:
    """Put the hashed weights into an agent; every parameter must be met."""
    parameters = dict(agent.named_parameters())
    with torch.no_grad():
        for name in names:
            hash_name = prefix + (name if prefix != "xl." else name.removeprefix("wm.dyn_model.prediction_net."))
            parameter = parameters.pop(ours(name))
            parameter.copy_(filled(hash_name, tuple(parameter.shape)))
    assert not parameters


def args(**changes):
    return m.Args(**{"precision": "fp32", "action_repeat": 4, **changes})


XL = dict(latents=3, classes=4, cnn_depth=1, encoder_units=2, memory_length=4, layers=3, width=24, heads=2, head_dim=8,
          ff_units=40, dropout=0.0, head_layers=2, latent_units=20, scalar_units=20, ac_layers=1, ac_units=2)
E2E = dict(latents=8, classes=6, cnn_depth=4, memory_length=4, layers=2, width=32, heads=2, head_dim=8, ff_units=48,
           dropout=0.0, head_layers=2, latent_units=32, scalar_units=16, ac_layers=2, ac_units=32, batch_length=5,
           batch_size=3, imag_batch=4, imag_horizon=7)
SHAPES = {"image": (64, 64, 1)}


def make_agent(flags: dict, actions: int, prefix: str, double: bool = True):
    settings = args(**flags)
    agent = m.Agent(SHAPES, actions, True, settings)
    names = official_names(settings.head_layers, settings.layers, settings.ac_layers)
    fill(agent, prefix, names)
    return (agent.double() if double else agent).eval()


@functools.cache
def xl():
    """The small official Transformer of the group `xl`."""
    with torch.random.fork_rng():
        return make_agent(XL, 3, "xl.").world.dynamics


def tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(G[name])


def time_first(name: str) -> torch.Tensor:
    return tensor(name).transpose(0, 1)


def onehot(index: torch.Tensor, classes: int) -> torch.Tensor:
    """(...,S) -> (...,S*K)."""
    return torch.nn.functional.one_hot(index, classes).flatten(-2).double()


def close(x, name: str, tolerance: float = 1e-9) -> None:
    expected = tensor(name)
    assert x.shape == expected.shape, (x.shape, expected.shape)
    scale = max(expected.abs().max().item(), 1.0)
    assert (x.double() - expected.double()).abs().max().item() <= tolerance * scale


@pytest.fixture
def double():
    """float64 by default, and every sample the mode."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def modes(monkeypatch):
    monkeypatch.setattr(m, "race_noise", torch.ones_like)


def test_hash():
    assert uniform("example", 5) == pytest.approx(G["hash/example_u"], abs=1e-15)
    for name in ("xl.embeds.z.linear1.weight", "xl.transformer.layers.1.norm1.weight"):
        expected = G[f"hash/{name}"]
        close(filled(name, expected.shape), f"hash/{name}", 1e-14)


# ---- Transformer ----
def xl_inputs() -> tuple:
    """z, a, r, is_last (12,2,...); the last r and end are not seen."""
    reward = torch.cat([time_first("xl/r"), torch.zeros(1, 2, **F64)])
    is_last = torch.cat([time_first("xl/done"), torch.zeros(1, 2, dtype=torch.bool)])
    return onehot(time_first("xl/z_index"), 4), time_first("xl/a"), reward, is_last


def begins(is_last: torch.Tensor) -> torch.Tensor:
    """The step at which the episode of each step began, by definition."""
    begin = torch.zeros(is_last.shape, dtype=torch.long)
    for t in range(1, len(is_last)):
        begin[t] = torch.where(is_last[t - 1], t, begin[t - 1])
    return begin


def visible(first: torch.Tensor, start: int = 0) -> torch.Tensor:
    """(B,Q) -> (B,Q,L): the official mask is its opposite."""
    key = torch.arange(start + first.shape[1])
    return (key >= first[..., None]) & (key <= key[start:, None])


def step_by_step(dynamics, latent, action, reward, is_last) -> tuple[torch.Tensor, torch.Tensor]:
    """h (T,B,D) with the cache of keys and values, and the cache."""
    begin = begins(is_last)
    cache = dynamics.empty_cache(latent.shape[1], len(latent))
    hidden = [dynamics.step(cache, 0, latent[0], action[0])]
    for t in range(1, len(latent)):
        hidden.append(dynamics.step(cache, t, latent[t], action[t], reward[t - 1], begin[t - 1 : t + 1]))
    return torch.stack(hidden), cache


@torch.no_grad()
def test_transformer_full():
    hidden = xl()(*xl_inputs())
    close(hidden.transpose(0, 1), "xl/h_full", 1e-6)
    latent, reward, cont = xl().heads(hidden)
    close(latent.flatten(2).transpose(0, 1), "xl/head_z", 1e-6)
    close(reward.T[..., None], "xl/head_r", 1e-6)
    close(cont.T[..., None], "xl/head_g", 1e-6)


@torch.no_grad()
def test_transformer_with_cache():
    """Sequences longer than the memory, with ends inside: as the official memory of hidden states."""
    hidden, cache = step_by_step(xl(), *xl_inputs())
    close(hidden.transpose(0, 1), "xl/h_step", 1e-6)
    length = 3 * 12 - 1
    for i, layer in enumerate(xl().transformer.layers):
        memory = layer.attention.qkv(tensor("xl/mems_step")[i].transpose(0, 1))  # (2,14,3*16)
        key, value = [layer.attention.split(part) for part in memory.chunk(3, -1)[1:]]
        assert (cache[i, 0, :, :, length - 14 : length] - key).abs().max() < 1e-6
        assert (cache[i, 1, :, :, length - 14 : length] - value).abs().max() < 1e-6


def test_masks():
    begin = begins(xl_inputs()[3]).T
    mask = ~visible(m.first_visible(begin, 4)[:, :-1])
    assert torch.equal(mask.permute(1, 2, 0), tensor("xl/mask_full"))
    last = m.first_visible(begin[:, -2:], 4, 10)[:, 2:5]
    mask = ~visible(last, 3 * 11 - 1)[:, :, -17:]  # the official memory has 14 tokens
    assert torch.equal(mask.permute(1, 2, 0), tensor("xl/mask_step_last"))


def test_default_masks():
    begin = torch.zeros(1, 21, dtype=torch.long)
    first = m.first_visible(begin, 16)[0]
    assert first[:62].tolist() == G["mask/steps20_start"].tolist()
    assert bool((first[:50] == 0).all()) == bool(G["mask/default_train_is_causal"])
    # the official tokens of a step see 50 tokens of memory: those of step 17 see all there are
    step = m.first_visible(begin[:, :2], 16, 16)[:, 2:5]
    assert torch.equal(~visible(step, 50)[0], tensor("mask/default_step"))


@torch.no_grad()
def test_attention(monkeypatch):
    """Scale 1 / sqrt(24), not 1 / sqrt(8); three tokens of memory."""
    transformer = xl().transformer
    attention = transformer.layers[0].attention
    x = hashed("att.x", 5, 2, 24).transpose(0, 1)
    memory = attention.qkv(hashed("att.mem", 3, 2, 24).transpose(0, 1))
    cache = torch.zeros(2, 2, 2, 8, 8, **F64)
    cache[:, :, :, :3] = torch.stack([attention.split(part) for part in memory.chunk(3, -1)[1:]])
    sinusoids = transformer.sinusoids.double()[torch.arange(7, -1, -1)]
    seen = ~tensor("att/mask")[None, None]
    context = (sinusoids, transformer.u[:, None], transformer.v[:, None], seen, cache)
    close(attention(x, *context).transpose(0, 1), "att/out", 1e-6)

    # with unit vectors as values, what comes out are the weights
    original = torch.nn.functional.scaled_dot_product_attention
    units = torch.eye(8, **F64).expand(2, 2, 8, 8)
    monkeypatch.setattr(
        m.F, "scaled_dot_product_attention", lambda q, k, v, *a, **k2: original(q, k, units, *a, **k2))
    monkeypatch.setattr(attention, "out", torch.nn.Identity())
    weights = attention(x, *context).unflatten(-1, (2, 8))  # (B,Q,heads,key)
    close(weights.permute(1, 3, 0, 2), "att/weights", 1e-6)


def test_relative_shift():
    queries, length = G["relshift/in"].shape
    shifted = m.relative_shift(tensor("relshift/in"))
    for i in range(queries):
        seen = length - queries + i + 1  # what is right of it is hidden by the mask
        assert torch.equal(shifted[i, :seen], tensor("relshift/out")[i, :seen])


def test_sinusoids():
    transformer = m.Transformer(args(layers=1))
    assert transformer.sinusoids.shape == (53, 256)
    close(transformer.sinusoids[[0, 1, 2, 52]], "posenc/rows_0_1_2_52", 5e-6)  # float32, whose exp differs by CPU


# ---- default size ----
@torch.no_grad()
def test_default_agent():
    agent = make_agent({}, 6, "", double=False)
    obs = ((hashed("def.o", 2, 1, 4, 64, 64) + 1) / 2).float()
    logits = agent.world.encoder(obs[:, 0].permute(0, 2, 3, 1)[None])[0]
    close(logits.log_softmax(-1), "def/z_logits", 1e-4)
    assert torch.equal(logits.argmax(-1), tensor("def/z_argmax"))
    latent = m.mode_latent(logits)
    recon = agent.world.decoder(latent[None])[0].permute(0, 3, 1, 2)
    close(recon[:, :, ::8, ::8], "def/recon_stride8", 1e-4)
    stats = torch.stack([recon.mean(), recon.std(), recon.abs().sum()])
    assert stats.numpy() == pytest.approx(G["def/recon_stats"], rel=1e-4, abs=1e-6)
    close(agent.behaviour.actor(latent), "def/actor_logits", 1e-4)
    close(agent.behaviour.value(latent), "def/critic_values", 1e-4)

    latent = onehot(time_first("def/dyn_z_index"), 32).float()
    reward = torch.cat([time_first("def/dyn_r").float(), torch.zeros(1, 2)])
    is_last = torch.cat([time_first("def/dyn_done"), torch.zeros(1, 2, dtype=torch.bool)])
    hidden = agent.world.dynamics(latent, time_first("def/dyn_a"), reward, is_last)
    close(hidden.transpose(0, 1), "def/dyn_h", 1e-4)
    prior_logits, mean, cont = agent.world.dynamics.heads(hidden)
    # whether the official last logits are normalised does not matter
    expected = tensor("def/dyn_z_logits_last").log_softmax(-1)
    assert (prior_logits[-1].log_softmax(-1) - expected).abs().max() < 1e-4
    close(mean.T, "def/dyn_r_mean", 1e-4)
    close(cont.sigmoid().T, "def/dyn_g", 1e-4)


# ---- losses ----
def small_world(**changes):
    return m.WorldModel(SHAPES, 3, args(cnn_depth=1, layers=1, **changes))


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


@pytest.mark.parametrize("name", ["hi", "lo"])
def test_entropy_loss(name):
    logits = leaf(hashed(f"ent.{name}", 2, 3, 32, 32) * float(G[f"ent/{name}_scale"]))
    loss = small_world().entropy_loss(logits)
    (grad,) = torch.autograd.grad(loss, logits)
    share = m.entropy(logits.log_softmax(-1)).mean() / np.log(32)
    assert share.item() == pytest.approx(G[f"ent/{name}_norm_entropy"], abs=1e-9)
    assert loss.item() == pytest.approx(G[f"ent/{name}_loss"], abs=1e-9)
    assert grad.norm().item() == pytest.approx(G[f"ent/{name}_grad_norm"], abs=1e-9)
    close(grad[0, 0, 0], f"ent/{name}_grad_row")


def test_consistency_loss():
    logits = leaf(3 * hashed("con.logits", 2, 3, 32, 32))
    predicted = 3 * hashed("con.pred", 2, 3, 32, 32)
    loss = small_world().consistency_loss(logits, predicted)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(G["con/loss"], abs=1e-9)
    assert m.cross_entropy(predicted.softmax(-1), logits).mean().item() == pytest.approx(G["con/cross_entropy"])
    reverse = m.cross_entropy(logits.softmax(-1), predicted).mean().item()
    assert reverse == pytest.approx(G["con/reversed_cross_entropy_NOT_used"])
    assert grad.norm().item() == pytest.approx(G["con/grad_norm"], abs=1e-9)
    close(grad[1, 2, 3], "con/grad_row")
    definition = 0.01 * (logits.softmax(-1) - predicted.softmax(-1)) / 6
    assert (grad - definition).abs().max() < 1e-12


def test_decoder_loss():
    recon = leaf(hashed("dec.rec", 2, 2, 4, 64, 64))
    obs = (hashed("dec.o", 2, 2, 4, 64, 64) + 1) / 2
    loss = small_world().decoder_loss(recon, obs)
    (grad,) = torch.autograd.grad(loss, recon)
    assert loss.item() == pytest.approx(G["dec/loss"], abs=1e-8)
    assert grad.norm().item() == pytest.approx(G["dec/grad_norm"], abs=1e-9)
    close(grad[0, 0, 0, 0, :8], "dec/grad_0000_first8")


def test_dynamics_losses():
    heads = {
        "z": leaf(3 * hashed("dyn.z", 2, 6, 1024)),
        "r": leaf(hashed("dyn.r", 2, 6, 1)),
        "g": leaf(4 * hashed("dyn.g", 2, 6, 1)),
    }
    predicted = (
        heads["z"].unflatten(-1, (32, 32)).transpose(0, 1)[1:],
        heads["r"][..., 0].T[1:],
        heads["g"][..., 0].T[1:],
    )
    target = (3 * hashed("dyn.target", 2, 5, 32, 32)).transpose(0, 1)
    is_terminal = time_first("dyn/terminated")
    is_last = is_terminal | time_first("dyn/truncated")
    close(m.to_discount(is_terminal, 0.99).T, "dyn/target_g", 1e-7)
    losses = small_world().dynamics_losses(
        predicted, target, hashed("dyn.rew", 2, 6).T[1:], is_terminal[1:], is_last[1:])
    total = sum(losses.values())
    assert losses["latent"].item() == pytest.approx(G["dyn/z_pred_loss"], abs=1e-7)
    assert losses["reward"].item() == pytest.approx(G["dyn/reward_loss"], abs=1e-7)
    assert losses["cont"].item() == pytest.approx(G["dyn/discount_loss"], abs=1e-6)
    assert total.item() == pytest.approx(G["dyn/dyn_loss"], abs=1e-6)

    grads = torch.autograd.grad(total, list(heads.values()))
    close(grads[0].norm(dim=-1), "dyn/grad_z_norm_per_step")
    close(grads[1][..., 0], "dyn/grad_r")
    close(grads[2][..., 0], "dyn/grad_g", 1e-7)
    close(predicted[2].T.sigmoid(), "dyn/pred_g")
    close(heads["z"][1, 0].view(32, 32)[5].softmax(-1), "dyn/z_hat_probs_row")


def test_discount():
    close(m.to_discount(tensor("disc/in_terminated"), 0.99), "disc/out", 1e-7)


# ---- behaviour ----
def behaviour():
    return m.Behaviour(6, args(ac_layers=1, ac_units=4))


def test_advantages():
    cont = time_first("gae/g") * ~time_first("gae/done")
    advantage = m.gae(time_first("gae/r"), cont, time_first("gae/v"), 0.95)
    close(advantage.T, "gae/adv")
    close((advantage + time_first("gae/v")[:-1]).T, "gae/ret")


@pytest.mark.parametrize("name", ["hi", "lo"])
def test_actor_loss(name):
    logits = leaf((hashed("ac.logits", 3, 6, 6) * float(G[f"ac/{name}_scale"])).transpose(0, 1))
    weight = time_first("ac/weights")
    loss, share = behaviour().actor_loss(logits, time_first("ac/actions"), time_first("gae/adv"), weight)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(G[f"ac/{name}_loss"], abs=1e-9)
    assert share.item() == pytest.approx(G[f"ac/{name}_norm_ent"], abs=1e-9)
    close(grad.transpose(0, 1), f"ac/{name}_grad")


def test_critic_loss():
    value = leaf(time_first("gae/v")[:-1])
    loss = behaviour().critic_loss(value, time_first("gae/ret"), time_first("ac/weights"))
    (grad,) = torch.autograd.grad(loss, value)
    assert loss.item() == pytest.approx(G["ac/critic_loss"], abs=1e-9)
    close(grad.T, "ac/critic_grad")


class Script:
    """Dynamics that predict given discounts."""

    def __init__(self, discounts):
        self.discounts = discounts
        self.steps = []

    def empty_cache(self, batch, steps):
        return None

    def step(self, cache, step, latent, action, reward=None, begin=None):
        self.steps.append((step, begin))
        return torch.full((len(latent), 1), float(step), **F64)

    def heads(self, hidden):
        step = int(hidden[0, 0]) - 1
        batch = len(hidden)
        return torch.zeros(batch, 32, 32, **F64), torch.zeros(batch, **F64), self.discounts[:, step].logit()


def test_dream_ends(double, modes):
    """Ends, weights and restarts under given discounts."""
    agent = behaviour()
    agent.args.imag_horizon = 7
    world = small_world()
    dynamics = Script(tensor("dream/g_script"))
    world.dynamics = None
    object.__setattr__(world, "dynamics", dynamics)
    del world._modules["dynamics"]
    agent.actor = torch.nn.Linear(1024, 6)
    start = {
        "context": torch.zeros(4, 1024),
        "latent": torch.zeros(4, 1024),
        "action": torch.zeros(4, dtype=torch.long),
        "reward": torch.zeros(4),
        "is_last": tensor("dream/start_done")[:, 0],
    }
    dream = agent.imagine(world, start, torch.full((4, 1024), 7.0))
    assert torch.equal(dream["end"].T, tensor("dream/done"))
    close(dream["weight"].T, "dream/weights", 1e-7)
    restarted = (dream["latent"][1:] == 7).all(-1).T
    assert torch.equal(restarted, tensor("dream/restarted_next_z"))
    for step, begin in dynamics.steps[1:]:
        is_last = torch.cat([tensor("dream/start_done"), tensor("dream/done")], 1).T
        assert torch.equal(begin, begins(is_last)[step - 1 : step + 1])


# ---- replay and schedule ----
def make_replay(folder, steps: int, temperature: float = 20.0, capacity: int = 64):
    """`steps` steps in line, whose image, action and reward tell their number; one more is only seen."""
    shapes = {"image": (1, 1, 1)}
    replay = m.Replay(
        m.replay_specs(shapes, 200), capacity, 1, folder, torch.device("cpu"), frames=1, temperature=temperature)
    for i in range(steps + 1):
        replay.add({
            "image": np.full((1, 1, 1, 1), 100 + i, np.uint8),
            "reward": np.array([99.0 + i], np.float32),  # what step i - 1 led to
            "is_first": np.array([i == 0]),
            "is_last": np.array([False]),
            "is_terminal": np.array([False]),
            "action": torch.nn.functional.one_hot(torch.tensor([100 + i]), 200).float(),
        })
    return replay


def test_sequences(tmp_path):
    """Context before the beginning, and the observation after the last step."""
    replay = make_replay(tmp_path, 10)
    start = tensor("idx/query")[:, 0]
    env = torch.zeros_like(start)
    step, batch = replay.sequences(env, start, 4)
    images = replay.stacks(env, step)[..., 0, 0, 0]
    assert torch.equal(images.T.long(), tensor("idx/obs"))
    assert torch.equal(batch["action"].T, tensor("idx/act_fill0"))
    assert torch.equal(batch["reward"].T.long(), tensor("idx/act_fill0"))


def test_balanced_sampling(tmp_path, monkeypatch):
    visits = tensor("bal/visits")
    close(m.visit_logits(visits.double(), 20.0).softmax(-1), "bal/probs_tau20", 1e-6)
    uniform_logits = m.visit_logits(visits.double(), float("inf"))  # as the paper says; the official 'inf' is not quite
    assert torch.equal(uniform_logits, torch.zeros_like(uniform_logits))
    assert G["bal/probs_inf"].std() > 0

    replay = make_replay(tmp_path, 20)
    replay.visits[0, :20] = visits
    chosen = tensor("bal/sample_idx")[:, 0]

    def noise(like):
        """The race that these starts win."""
        return torch.ones_like(like, dtype=torch.float64).index_fill_(1, chosen, 1e-300)

    monkeypatch.setattr(m, "race_noise", noise)
    batch = replay.sample(4, 4)
    assert replay.visits[0, :20].tolist() == G["bal/visits_after"].tolist()
    assert sorted(batch["action"][1].tolist()) == sorted((100 + chosen).tolist())


def test_schedule():
    credit = 0.0
    counts = []
    for _ in range(95_000):
        count, credit = m.updates_due(credit + 1, float(G["sched/train_every"]))
        counts.append(count)
    first = G["sched/updates_after_each_step_first40"]
    assert np.array_equal(first, counts[:40]) or np.array_equal(first, np.cumsum(counts[:40]))
    assert sum(counts) == G["sched/total_updates"] == 124_999
    settings = m.Args()
    samples = settings.batch_size * settings.batch_length + settings.imag_batch * settings.imag_horizon
    assert samples == G["sched/budget_per_step"]
    assert settings.train_every == float(G["sched/train_every"])


# ---- optimiser, and everything together ----
def test_adam(double):
    x = torch.nn.Parameter(tensor("opt/x0").clone())
    adam = m.Adam([x], 0.05, 1.0, 0.5)
    for expected in tensor("opt/x_after_1_to_4"):
        loss = 0.5 * (tensor("opt/scale") * (x - tensor("opt/target"))).square().sum()
        adam.step(loss)
        assert (x - expected).abs().max() < 1e-12


def short(official: str) -> str:
    """The official name as `e2e/grad_names` has it."""
    for prefix, here in {
        "wm.obs_model": "obs", "wm.dyn_model": "dyn", "ac.actor_model": "actor", "ac.critic_model": "critic"
    }.items():
        official = official.replace(prefix, here)
    return official


class Recorder:
    """Optimisers that keep the gradients of each step."""

    def __init__(self, optimizer, agent):
        names = {id(p): name for name, p in agent.named_parameters()}
        self.grads = {}
        for part in vars(optimizer).values():
            self.watch(part, names)

    def watch(self, part, names):
        step = part.step

        def recorded(loss):
            grads = torch.autograd.grad(loss, part.params, retain_graph=True)
            self.grads.update({names[id(p)]: grad for p, grad in zip(part.params, grads)})
            return step(loss)

        part.step = recorded


class Recorded:
    """A replay that returns one batch, and class 0 as restart."""

    def __init__(self, batch):
        self.batch = batch

    def sample(self, batch_size, length):
        return dict(self.batch)


def test_update_and_dream(double, modes, monkeypatch):
    """One update of the world model, a dream and one update of actor and critic: losses, gradients, weights."""
    agent = make_agent(E2E, 5, "e2e.")
    names = official_names(2, 2, 2)
    optimizer = m.Optimizers(agent, agent.args)
    recorder = Recorder(optimizer, agent)
    obs = (hashed("e2e.o", 3, 7, 4, 64, 64) + 1) / 2
    is_terminal = time_first("e2e/terminated")
    batch = {
        "image": 255 * obs.permute(1, 0, 3, 4, 2),
        "action": time_first("e2e/a"),
        "reward": time_first("e2e/r").atanh(),
        "is_terminal": is_terminal,
        "is_last": is_terminal | time_first("e2e/truncated"),
    }
    hiddens = []
    monkeypatch.setattr(
        agent.world.dynamics.transformer, "forward",
        lambda *a: hiddens.append(type(agent.world.dynamics.transformer).forward(agent.world.dynamics.transformer, *a))
        or hiddens[-1])
    start, metrics = m.train_world_model(agent, optimizer, Recorded(batch), 3)
    close(hiddens[0][:, 1::3].detach(), "e2e/h", 1e-8)
    expected = {
        "recon": "dec_loss", "entropy": "z_entropy_loss", "consistency": "enc_prior_loss", "latent": "z_pred_loss",
        "reward": "reward_loss", "cont": "discount_loss",
    }
    for here, theirs in expected.items():
        assert metrics[f"losses/{here}"].item() == pytest.approx(G[f"e2e/{theirs}"], rel=1e-8, abs=1e-12)
    assert metrics["grad/dynamics_norm"].item() == pytest.approx(G["e2e/grad_norm_dyn."], rel=1e-8)
    assert metrics["grad/observation_norm"].item() == pytest.approx(G["e2e/grad_norm_obs."], rel=1e-8)
    dynamics_loss = sum(metrics[f"losses/{k}"] for k in ("latent", "reward", "cont")).item()
    assert dynamics_loss == pytest.approx(G["e2e/dyn_loss"], rel=1e-8)
    without = dynamics_loss - metrics["losses/latent"].item()
    assert without == pytest.approx(G["e2e/published_dyn_loss_without_z_term"], rel=1e-8)
    latent = torch.cat([start["context"].unflatten(0, (5, 3)), start["latent"].unflatten(0, (5, 3))[-1:]])
    assert torch.equal(latent.unflatten(-1, (8, 6)).argmax(-1).transpose(0, 1), tensor("e2e/z_index"))

    # the official candidates are numbered batch first
    sequence, step = tensor("e2e/start_select") // 5, tensor("e2e/start_select") % 5
    start = {k: v[step * 3 + sequence] for k, v in start.items()}
    restart = onehot(torch.zeros(4, 8, dtype=torch.long), 6)
    dream = agent.behaviour.imagine(agent.world, start, restart)
    assert torch.equal(dream["latent"].unflatten(-1, (8, 6)).argmax(-1).transpose(0, 1), tensor("e2e/dream_z_index"))
    assert torch.equal(dream["action"].T, tensor("e2e/dream_a"))
    assert torch.equal(dream["end"].T, tensor("e2e/dream_done"))
    close(dream["reward"].T, "e2e/dream_r", 1e-8)
    close(dream["cont"].T, "e2e/dream_g", 1e-8)
    close(dream["weight"].T, "e2e/dream_weights", 1e-8)
    expected_hidden = time_first("e2e/dream_h")[-7:]  # the first is the one of the context
    assert (dream["hidden"] - expected_hidden).abs().max() < 1e-7

    losses, metrics = agent.behaviour.losses(dream)
    critic_norm = optimizer.critic.step(losses["value"])
    actor_norm = optimizer.actor.step(losses["policy"])
    assert losses["value"].item() == pytest.approx(G["e2e/ac_critic_loss"], rel=1e-8)
    assert losses["policy"].item() == pytest.approx(G["e2e/ac_actor_loss"], rel=1e-8)
    assert metrics["ac/entropy_share"].item() == pytest.approx(G["e2e/ac_norm_ent"], rel=1e-8)
    assert critic_norm.item() == pytest.approx(G["e2e/grad_norm_critic."], rel=1e-8)
    assert actor_norm.item() == pytest.approx(G["e2e/grad_norm_actor."], rel=1e-8)

    official = {short(name): ours(name) for name in names}
    assert set(official) == set(G["e2e/grad_names"])
    for name, norm, dot in zip(G["e2e/grad_names"], G["e2e/grad_l2"], G["e2e/grad_dot_hash"]):
        grad = recorder.grads[official[str(name)]]
        assert grad.norm().item() == pytest.approx(norm, rel=1e-7, abs=1e-10), name
        assert (grad * hashed(f"dot.{name}", *grad.shape)).sum().item() == pytest.approx(dot, rel=1e-6, abs=1e-8), name
    parameters = dict(agent.named_parameters())
    close(parameters["world.encoder.convs.0.bias"].detach(), "e2e/after_obs.encoder.0.conv1.bias", 1e-8)
    close(parameters["world.dynamics.transformer.u"].detach(), "e2e/after_dyn.u_bias", 1e-8)
    close(parameters["behaviour.actor.6.bias"].detach(), "e2e/after_actor.linear3.bias", 1e-8)
    close(parameters["behaviour.critic.6.bias"].detach(), "e2e/after_critic.linear3.bias", 1e-8)
