"""iris.py against numbers that the functions of eloialonso/iris (24326aa) gave.

`given` reads an input, `close` and `same` compare an output; the last test fails if an array of the file was neither.
Networks of the official size have weights that `fill` makes from the official names of the parameters; the functions
`..._names` translate ours. Official arrays are (B,T,...), ours are time first but inside the Transformer. Everything
is computed in float64, but whole dreams, which take long, in float32."""
import math
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, load
from torch import nn

iris = load("iris")
GOLDEN = golden("iris")
INPUTS, COMPARED = set(), set()
K, A = 16, 6


def given(name):
    INPUTS.add(name)
    x = torch.tensor(GOLDEN[name])
    return x.double() if x.is_floating_point() else x


def expected(name):
    COMPARED.add(name)
    return torch.tensor(GOLDEN[name])


def close(ours, name, tolerance=1e-6):
    """Every entry, relative to itself or, where it is small, to a tenth of the largest one."""
    ours = torch.as_tensor(ours).detach().double()
    theirs = expected(name).double()
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    size = theirs.abs()
    error = ((ours - theirs).abs() / size.clamp(min=max(0.1 * size.max().item(), 1e-12))).max()
    assert error <= tolerance, f"{name}: relative error {error:.3g}"


def same(ours, name):
    ours = torch.as_tensor(ours)
    theirs = expected(name)
    assert ours.shape == theirs.shape, name
    assert torch.equal(ours.to(theirs.dtype), theirs), name


# ---- weights and images from integer arithmetic ----


def uniforms(seed, count):
    x = (2654435761 * np.arange(count, dtype=np.uint64) + np.uint64(40503 * seed + 12345)) % 2**32
    for _ in range(2):
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x45D9F3B)) % 2**32
    return (x ^ (x >> np.uint64(16))) / 2**32


def fill(name, shape, bound):
    seed = zlib.crc32(name.encode()) % 2**24
    value = (2 * uniforms(seed, math.prod(shape)) - 1) * bound
    return torch.from_numpy(value.astype(np.float32)).view(shape)


def fill_weight(name, shape):
    """A matrix or kernel, or a vector."""
    bound = math.sqrt(3 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
    return fill(name, shape, bound)


@torch.no_grad()
def fill_all(model, prefix, names, embedding=1.0):
    """All layers of a model. `names`: ours -> the official ones, several where one layer of ours is their union."""
    for ours, layer in model.named_modules():
        for kind, weight in layer.named_parameters(recurse=False):
            official = [f"{prefix}.{name}.{kind}" for name in names(ours)]
            shape = (len(weight) // len(official), *weight.shape[1:])
            if isinstance(layer, nn.Embedding):
                weight.copy_(fill(*official, shape, embedding))
            else:
                weight.copy_(torch.cat([fill_weight(name, shape) for name in official]))
            if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)) and kind == "weight":
                weight += 1


def tokenizer_names(name):
    part, *path = name.split(".")
    if part == "codebook":
        return ["embedding"]
    if not path:
        return [f"{part}_conv"]  # pre_quant, post_quant
    kind, *path = path
    if kind == "middle":
        block = ("block_1", "attn_1", "block_2")[int(path[0])]
        stem = f"{part}.mid.{block}"
    elif kind == "stages":
        level, i = int(path[0]), int(path[1])
        stem = f"{part}.{dict(encoder='down', decoder='up')[part]}.{level}."
        if level in (2, 3):  # blocks and attention take turns
            stem += f"{('block', 'attn')[i % 2]}.{i // 2}"
        else:
            stem += f"block.{i}"
    elif kind == "downs":
        return [f"{part}.down.{path[0]}.downsample.conv"]
    elif kind == "ups":
        return [f"{part}.up.{int(path[0]) + 1}.upsample.conv"]
    else:
        return [f"{part}.{kind}"]
    leaves = dict(qkv=("q", "k", "v"), out=("proj_out",))
    return [f"{stem}.{leaf}" for leaf in leaves.get(path[-1], (path[-1],))]


def world_names(name):
    table = dict(norm="transformer.ln_f", position="pos_emb", action="embedder.embedding_tables.0")
    table["token"] = "embedder.embedding_tables.1"
    if name in table:
        return [table[name]]
    part, i, *leaf = name.split(".")
    heads = dict(token_head="observations", reward_head="rewards", end_head="ends")
    if part in heads:
        return [f"head_{heads[part]}.head_module.{i}"]
    leaves = dict(norm1=["ln1"], norm2=["ln2"], qkv=["attn.query", "attn.key", "attn.value"], out=["attn.proj"])
    leaf = ".".join(leaf)
    return [f"transformer.blocks.{i}.{official}" for official in leaves.get(leaf, [leaf])]


def behaviour_names(name):
    part, *i = name.split(".")
    if part == "convs":
        return [f"conv{int(i[0]) + 1}"]
    return [dict(lstm="lstm", actor="actor_linear", critic="critic_linear")[part]]


@pytest.fixture(scope="module")
def agent():
    """The official sizes with filled weights, float64."""
    args = iris.Args(precision="fp32", perceptual_loss="none")
    agent = iris.Agent({"image": (64, 64, 3)}, A, True, args)
    fill_all(agent.tokenizer, "tokenizer", tokenizer_names)
    fill_all(agent.world, "world_model", world_names, embedding=0.5)
    fill_all(agent.behaviour, "actor_critic", behaviour_names)
    return agent.double()


@pytest.fixture(scope="module")
def lpips():
    """In evaluation mode: without dropout."""
    weights = {}
    widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    for i, inputs, outputs in zip(iris.VGG16, widths, widths[1:]):
        part = 1 + sum(i > last for last in (3, 8, 15, 22))
        for kind, shape in ("weight", (outputs, inputs, 3, 3)), ("bias", (outputs,)):
            weights[f"features.{i}.{kind}"] = fill_weight(f"tokenizer.lpips.net.slice{part}.{i}.{kind}", shape)
    for k, width in enumerate((64, 128, 256, 512, 512)):
        name = f"lin{k}.model.1.weight"
        weights[name] = fill_weight(f"tokenizer.lpips.{name}", (1, width, 1, 1)).abs()
    return iris.LPIPS(weights).double().eval()


def smooth(name, *shape):
    """Random frames, averaged 9 x 9 with padding that counts, stretched to [0,1]."""
    x = fill(name, shape, 0.5) + 0.5
    x = F.avg_pool2d(x.flatten(0, -4), 9, 1, 4).view(shape)
    return ((x - x.min()) / (x.max() - x.min())).double()


@pytest.fixture(scope="module")
def pictures():
    return smooth("tok_x", 2, 3, 64, 64)


def grad_norm(module):
    return torch.stack([p.grad.norm() for p in module.parameters()]).norm()


def test_fill():
    close(fill("check", (5,), 1.0), "fill/check_name_check_shape5_bound1")


# ---- tokenizer ----


def test_vector_quantisation():
    """With stubs for encoder and decoder, as the official numbers were made."""
    args = iris.Args(code_dim=8, vocab_size=6, channels=2, res_blocks=1)
    tokenizer = iris.Tokenizer(3, args).double()
    z = given("vq/z").requires_grad_()
    tokenizer.codebook.weight = nn.Parameter(given("vq/codebook"))
    through = []

    def decoder(x):
        through.append(x)
        return x[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)

    tokenizer.embed = lambda frames: z
    tokenizer.reconstruct = decoder
    losses, _ = tokenizer.loss(given("vq/x01"))
    tokens = tokenizer.encode(given("vq/x01"))
    same(tokens, "vq/tokens")
    close(tokenizer.lookup(tokens), "vq/z_q")
    close(through[0], "vq/straight_through")
    close(losses["codebook"] + losses["commit"], "vq/loss_commitment")
    close(losses["image"], "vq/loss_reconstruction")
    grads = torch.autograd.grad(sum(losses.values()), (z, tokenizer.codebook.weight))
    close(grads[0], "vq/grad_z")
    close(grads[1], "vq/grad_codebook")


def test_tokenizer(agent, lpips, pictures):
    tokenizer = agent.tokenizer
    close(pictures[..., ::16, ::16], "tok/x_check")
    z = tokenizer.embed(pictures)
    close(z[:, :16], "tok/z_first16", 1e-3)
    tokens = tokenizer.encode(pictures)
    same(tokens, "tok/tokens")
    distance = torch.cdist(z.flatten(2).mT, tokenizer.codebook.weight).sort(-1)[0]
    close((distance[..., 1] - distance[..., 0]).min(), "tok/min_margin", 1e-3)
    recon = tokenizer.reconstruct(tokenizer.lookup(tokens))
    close(recon[..., ::8, ::8], "tok/rec_strided", 1e-3)
    close(torch.stack([recon.mean(), recon.std()]), "tok/rec_mean_std", 1e-3)
    close(((recon + 1) / 2)[..., ::8, ::8], "tok/encode_decode_strided", 1e-3)

    losses, _ = tokenizer.loss(pictures, lpips)
    close(losses["codebook"] + losses["commit"], "tok/loss_commitment_loss", 1e-3)
    close(losses["image"], "tok/loss_reconstruction_loss", 1e-3)
    close(losses["perceptual"], "tok/loss_perceptual_loss", 1e-3)
    sum(losses.values()).backward()
    names = ("encoder", "pre_quant", "codebook", "post_quant", "decoder")
    close(torch.stack([grad_norm(getattr(tokenizer, name)) for name in names]), "tok/grad_norms", 1e-3)
    tokenizer.zero_grad()


def test_lpips(lpips, pictures):
    x = 2 * pictures - 1
    close(lpips(x, x.flip(0)), "lpips/value", 1e-3)
    close(torch.stack([feature.mean() for feature in lpips.features(x)]), "lpips/feature_means", 1e-3)


# ---- world model ----


def read_places(tokens, blocks):
    """Which positions of whole blocks are embedded as actions or as tokens, and which the token head reads."""
    args = iris.Args(layers=0, heads=1, width=2, vocab_size=2, batch_length=blocks)
    world = iris.WorldModel(tokens, 2, args)
    nn.init.constant_(world.action.weight, 1.0)
    nn.init.constant_(world.token.weight, 2.0)
    seen = []

    def forward(x, dropout):
        seen.append(x[0, :, 0])
        return torch.arange(x.shape[1]).view(1, -1, 1)

    world.forward = forward
    world.token_head = world.reward_head = world.end_head = nn.Identity()
    pred, reward, end = world.logits(torch.zeros(1, blocks, tokens).long(), torch.zeros(1, blocks).long())
    act = torch.where(seen[0] == 1)[0]
    assert torch.equal(reward.flatten(), act)
    assert torch.equal(end.flatten(), act)
    return dict(act=act, obs=torch.where(seen[0] == 2)[0], pred=pred.flatten())


def test_slicer():
    """A piece of a sequence, `count` positions after `past` ones, has those of the whole one that are in it."""
    for name in [name for name in GOLDEN if name.startswith("slicer/")]:
        kind, size, count, past = name.removeprefix("slicer/").split("_")
        size, count, past = int(size[1:]), int(count[1:]), int(past[1:])
        places = read_places(size - 1, -(-(count + past) // size))[kind]
        same(places[(past <= places) & (places < past + count)] - past, name)


@pytest.fixture()
def tiny_world():
    args = iris.Args(layers=2, heads=2, width=8, vocab_size=11, batch_length=4, dropout=0.0)
    world = iris.WorldModel(4, 3, args).double()
    for ours, layer in world.named_modules():
        for kind, weight in layer.named_parameters(recurse=False):
            parts = [given(f"tinywm/w/{name}.{kind}") for name in world_names(ours)]
            weight.data.copy_(torch.cat(parts))
    return world


def world_batch(name, tokens, action, actions):
    """Official tokens (B,T,K) and action (B,T) with the reward, end and mask of these names."""
    reward, end, mask = (given(f"{name}{k}").T for k in ("rewards", "ends", "mask_padding"))
    onehot = F.one_hot(action.T, actions)
    return dict(tokens=tokens.transpose(0, 1), action=onehot, reward=reward, end=end.bool(), mask=mask)


def test_tiny_world(tiny_world):
    world = tiny_world
    blocks = given("tinywm/tokens").unflatten(1, (4, 5))
    tokens, action = blocks[..., :4], blocks[..., 4]
    x = torch.cat([world.token(tokens), world.action(action)[:, :, None]], 2).flatten(1, 2)
    output = world(x)
    close(output, "tinywm/output_sequence", 1e-5)
    cache = world.empty_cache(2)
    pieces = [world(x[:, :4], 0, cache)]
    for i in range(4, 20):
        pieces.append(world(x[:, i : i + 1], i, cache))
    close(torch.cat(pieces, 1), "tinywm/incremental_output_sequence", 1e-5)
    assert (torch.cat(pieces, 1) - output).abs().max() < 1e-12
    for logits, name in zip(world.logits(tokens, action), ("observations", "rewards", "ends")):
        close(logits, f"tinywm/logits_{name}", 1e-5)

    batch = world_batch("tinywm/batch_", tokens, action, 3)
    labels = world.labels(tokens, *(batch[k].T for k in ("reward", "end", "mask")))
    for label, name in zip(labels, ("observations", "rewards", "ends")):
        same(label.flatten(), f"tinywm/labels_{name}")
    losses, _ = world.loss(batch, 0.0)
    for ours, name in ("token", "obs"), ("reward", "rewards"), ("end", "ends"):
        close(losses[ours], f"tinywm/loss_{name}", 1e-5)
    sum(losses.values()).backward()
    key = world.blocks[0].qkv.weight.grad[8:16]
    close(key, "tinywm/grad/transformer.blocks.0.attn.key.weight", 1e-5)
    close(world.position.weight.grad, "tinywm/grad/pos_emb.weight", 1e-5)
    close(world.action.weight.grad, "tinywm/grad/embedder.embedding_tables.0.weight", 1e-5)
    close(world.token.weight.grad, "tinywm/grad/embedder.embedding_tables.1.weight", 1e-5)
    close(world.reward_head[2].weight.grad, "tinywm/grad/head_rewards.head_module.2.weight", 1e-5)


def test_world_model(agent):
    world = agent.world
    tokens = torch.from_numpy(uniforms(91, 2 * 20 * K) * 512).long().view(2, 20, K)
    action = torch.from_numpy(uniforms(92, 2 * 20) * A).long().view(2, 20)
    token_logits, reward_logits, end_logits = world.logits(tokens, action)
    close(token_logits[:, -K:, :8], "wm/logits_obs_first8_lastblock", 1e-3)
    close(reward_logits, "wm/logits_rewards", 1e-3)
    close(end_logits, "wm/logits_ends", 1e-3)
    losses, _ = world.loss(world_batch("wm/", tokens, action, A), 0.0)
    for ours, name in ("token", "obs"), ("reward", "rewards"), ("end", "ends"):
        close(losses[ours], f"wm/loss_{name}", 1e-3)
    sum(losses.values()).backward()
    close(grad_norm(world), "wm/grad_norm_total", 1e-3)
    world.zero_grad()


def test_optimizer_groups(agent):
    """Ours has query, key and value in one layer per block: two matrices and two biases fewer."""
    groups = iris.Optimizers(agent, agent.args).parts["world"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    sizes = []
    for group in groups:
        sizes.append(len(group["params"]) + 2 * len(agent.world.blocks))
        sizes.append(sum(p.numel() for p in group["params"]))
    same(sizes, "optim/wm_group_sizes")


# ---- behaviour ----


@pytest.mark.parametrize("gamma, lam", [(0.995, 0.95), (0.9, 0.5)])
def test_lambda_return(gamma, lam):
    reward, value, end = (given(f"lambda/{k}").T for k in ("rewards", "values", "ends"))
    ret = iris.lambda_return(reward[:-1], value, end[:-1], gamma, lam)
    close(torch.cat([ret, value[-1:]]).T, f"lambda/returns_g{gamma}_l{lam}")


def test_actor_critic(agent):
    frames = smooth("ac_frames", 3, 7, 3, 64, 64).transpose(0, 1)
    close(frames.transpose(0, 1)[:, :, 0, ::32, ::32], "ac/frames_check")
    behaviour = agent.behaviour
    _, _, state = behaviour(frames[:4], behaviour.initial(3), given("ac/mask_padding").T)
    close(state[0][:, :8], "ac/hx_after_burnin_first8", 1e-4)
    close(state[1][:, :8], "ac/cx_after_burnin_first8", 1e-4)
    logits, value, _ = behaviour(frames[4:], state)
    close(logits.transpose(0, 1), "ac/logits", 1e-4)
    close(value.T, "ac/values", 1e-4)


def close_losses(losses, prefix, tolerance):
    for ours, name in ("policy", "actions"), ("value", "values"), ("entropy", "entropy"):
        close(losses[ours], f"{prefix}/loss_{name}", tolerance)


def test_actor_critic_losses(agent, monkeypatch):
    logits = given("acloss/logits").requires_grad_()
    value = given("acloss/values").requires_grad_()
    action, reward, end = (given(f"acloss/{k}").T for k in ("actions", "rewards", "ends"))
    outputs = (logits.transpose(0, 1), value.T, None)
    monkeypatch.setattr(agent.behaviour, "forward", lambda frames, state: outputs)
    dream = dict(frames=None, hidden=None, cell=None, action=action, reward=reward[:-1], end=end[:-1])
    losses, _ = agent.behaviour.loss(dream)
    close_losses(losses, "acloss", 1e-6)
    grads = torch.autograd.grad(sum(losses.values()), (logits, value))
    close(grads[0], "acloss/grad_logits")
    close(grads[1], "acloss/grad_values")


class Dreamer:
    """Greedy dreams of the agent in float32. Heads are scaled up, so that modes are clear; 21 real frames roll, of
    which the second sample lacks the first 8."""

    def __init__(self, agent, pictures):
        self.agent = agent
        world, behaviour = agent.world, agent.behaviour
        self.heads = [world.token_head[2], world.reward_head[2], world.end_head[2], behaviour.actor]
        self.mask = given("imagine/mask_padding").T
        frames = torch.stack([pictures.roll(3 * i, -1) for i in range(21)])
        frames = (frames * self.mask[..., None, None, None]).flatten(0, 1)
        with torch.no_grad():
            tokens = agent.tokenizer.encode(frames)
            self.tokens = tokens.unflatten(0, (21, 2))[-1]
            agent.float()
            self.recon = agent.tokenizer.decode(tokens).unflatten(0, (21, 2))
        self.scale(1)

    @torch.no_grad()
    def scale(self, power):
        for layer, factor in zip(self.heads, (20, 20, 20, 30)):
            layer.weight *= float(factor) ** power

    def imagine(self, horizon, monkeypatch):
        """-> dream, margins of all draws, and of all steps (size before, size after, tokens after), the Dream."""
        agent, margins, steps = self.agent, [], []

        def greedy(logits):
            top = logits.topk(2, -1)
            margins.append((top[0][..., 0] - top[0][..., 1]).min().item())
            return top[1][..., 0]

        step = iris.Dream.step

        def watched(dream, action):
            before = self.size(dream)
            outcome = step(dream, action)
            steps.append((before, self.size(dream), dream.tokens, dream))
            return outcome

        monkeypatch.setattr(iris, "sample", greedy)
        monkeypatch.setattr(iris.Dream, "step", watched)
        monkeypatch.setattr(agent.behaviour.args, "imag_horizon", horizon)
        out = agent.behaviour.imagine(agent.tokenizer, agent.world, self.tokens, self.recon, self.mask)
        return out, margins, steps

    def size(self, dream):
        """Positions of its sequence so far."""
        return dream.size + dream.waiting.shape[1]


@pytest.fixture(scope="module")
def dreamer(agent, pictures):
    dreamer = Dreamer(agent, pictures)
    yield dreamer
    agent.double()
    dreamer.scale(-1)


def test_imagine(dreamer, monkeypatch):
    """The official code also gives the last action to the world model; its reward and end enter no loss."""
    agent = dreamer.agent
    world = agent.world
    out, margins, steps = dreamer.imagine(20, monkeypatch)
    dream = steps[-1][3]
    before = dreamer.size(dream)
    with torch.no_grad():
        waiting = world.token(dream.waiting)
        y = dream.forward(torch.cat([waiting, world.action(out["action"][-1])[:, None]], 1))
        reward = iris.sample(world.reward_head(y)) - 1
        end = iris.sample(world.end_head(y))
    same(out["action"].T, "imagine/actions")
    same(torch.cat([out["reward"], reward[None]]).T, "imagine/rewards")
    same(torch.cat([out["end"], end[None]]).T, "imagine/ends")
    same(torch.stack([tokens for _, _, tokens, _ in steps], 1), "imagine/tokens")
    sizes = [step[:2] for step in steps] + [(before, dream.size)]
    same(sizes, "imagine/kv_sizes_before_after")
    close(min(margins), "imagine/min_argmax_margin", 1e-2)
    levels = out["frames"].transpose(0, 1)[..., ::16, ::16] * 255
    error = (levels - expected("imagine/observations_strided")).abs().max()
    assert error <= 1.01, "to one gray level: the official array is truncated"

    logits, value, _ = agent.behaviour(out["frames"], (out["hidden"], out["cell"]))
    close(logits.transpose(0, 1), "imagine/logits_actions", 1e-3)
    close(value.T, "imagine/values", 1e-3)
    losses, _ = agent.behaviour.loss(out)
    close_losses(losses, "imagine", 1e-3)
    sum(losses.values()).backward()
    for name, layer in agent.behaviour.named_modules():
        for kind, p in layer.named_parameters(recurse=False):
            close(p.grad.norm(), f"imagine/grad_norm/{behaviour_names(name)[0]}.{kind}", 1e-3)
    agent.behaviour.zero_grad()


def test_imagine_beyond_the_context(dreamer, monkeypatch):
    """Horizon 23: after 19 steps the memory is cut down to one frame."""
    behaviour = dreamer.agent.behaviour
    out, _, steps = dreamer.imagine(23, monkeypatch)
    with torch.no_grad():
        _, value, _ = behaviour(out["frames"], (out["hidden"], out["cell"]))
    same(out["action"].T, "imagine/actions_h23")
    close(value.T, "imagine/values_h23", 1e-3)
    last = steps[-1][1]
    sizes = [step[:2] for step in steps] + [(last, last + 1)]  # the last action, which needs no next frame
    same(sizes, "imagine/kv_sizes_before_after_h23")


# ---- environment and replay ----


def test_resize():
    """Official: the frames are resized, then the maximum of two is taken."""
    seed = int(given("env/raw_seed"))
    raw = np.floor(256 * uniforms(seed, 4 * 210 * 160 * 3)).astype(np.uint8).reshape(4, 210, 160, 3)
    raw = raw[:, ::7, ::5].repeat(7, 1).repeat(5, 2)
    same(raw[:, ::70, ::50], "env/raw_check")
    small = iris.resize(raw[2:], 64).astype(int)
    for ours, name in (small[1], "env/resized_last"), (small.max(0), "env/max_of_last_two_resized"):
        assert np.abs(ours - expected(name).numpy()).max() <= 1, name


def test_segments(tmp_path):
    """One episode of seven steps, whose last one is its end; the row that arrives with it is no frame."""
    specs = iris.replay_specs({"image": (1,)}, 1)
    replay = iris.Replay(specs, 20, 1, tmp_path, torch.device("cpu"))
    for t in range(8):
        row = dict(image=[[t]], reward=[0.0], is_first=[t == 0], is_last=[t == 7], action=[[1.0]])
        replay.add(row)
    first, stop, env = replay.make_table().T
    for name in {name.rsplit("_", 1)[0] for name in GOLDEN if name.startswith("segment/")}:
        start, end = (int(part[1:]) for part in name.removeprefix("segment/").split("_"))
        batch = replay.sequence(first + start, first, stop, env, end - start, "image end")
        same(batch["image"][:, 0, 0], f"{name}_obs")
        same(batch["mask"][:, 0], f"{name}_mask")
        same(batch["end"][:, 0], f"{name}_ends")


def test_every_array_is_used():
    assert INPUTS | COMPARED == set(GOLDEN), set(GOLDEN) - INPUTS - COMPARED
    assert not INPUTS & COMPARED
