"""iris.py against numbers that the functions of eloialonso/iris (24326aa) gave.

`given` reads an input, `close` and `same` compare an output; the last test fails if an array of the file was neither.
Networks of the official size have weights that `fill` makes from the official names of the parameters; here each
module is listed in the order of its execution beside its official name. Official arrays are (B,T,...), ours are time
first but inside the Transformer. Everything is computed in float64, but whole dreams, which take long, in float32."""
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, load
from test_iris import behaviour_losses, size
from torch import nn

iris = load("iris")
GOLDEN = golden("iris")
INPUTS, COMPARED = set(), set()
K, A = 16, 6
CPU = torch.device("cpu")


def given(name):
    INPUTS.add(name)
    x = torch.tensor(GOLDEN[name])
    return x.double() if x.is_floating_point() else x


def expected(name):
    COMPARED.add(name)
    return torch.tensor(GOLDEN[name])


def close(ours, name, tolerance=1e-6):
    """Every entry, relative to itself or, where it is small, to a tenth of the largest one."""
    ours, theirs = torch.as_tensor(ours).detach().double(), expected(name).double()
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    size = theirs.abs()
    error = ((ours - theirs).abs() / size.clamp(min=max(0.1 * size.max().item(), 1e-12))).max()
    assert error <= tolerance, f"{name}: relative error {error:.3g}"


def same(ours, name):
    ours, theirs = torch.as_tensor(ours), expected(name)
    assert ours.shape == theirs.shape and torch.equal(ours.to(theirs.dtype), theirs), name


# ---- weights and images from integer arithmetic ----


def uniforms(seed: int, count: int) -> np.ndarray:
    x = (2654435761 * np.arange(count, dtype=np.uint64) + np.uint64(40503 * seed + 12345)) % 2**32
    for _ in range(2):
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x45D9F3B)) % 2**32
    return (x ^ (x >> np.uint64(16))) / 2**32


def fill(name: str, shape: tuple, bound: float) -> torch.Tensor:
    value = (2 * uniforms(zlib.crc32(name.encode()) % 2**24, math.prod(shape)) - 1) * bound
    return torch.from_numpy(value.astype(np.float32)).view(shape)


@torch.no_grad()
def fill_module(module: nn.Module, *names: str) -> None:
    """Weights and biases of one layer; several names are the official parts of what is one layer here."""
    normalises = isinstance(module, (nn.GroupNorm, nn.LayerNorm))
    for kind, weight in module.named_parameters(recurse=False):
        shape = (len(weight) // len(names), *weight.shape[1:])
        bound = 0.1 if len(shape) == 1 else math.sqrt(3 / (math.prod(shape) / shape[0]))
        parts = [fill(f"{name}.{kind}", shape, bound) for name in names]
        weight.copy_(torch.cat(parts) + (normalises and kind == "weight"))


@torch.no_grad()
def fill_embedding(module: nn.Embedding, name: str, bound: float = 1.0) -> None:
    module.weight.copy_(fill(f"{name}.weight", module.weight.shape, bound))


def fill_block(module: nn.Module, name: str) -> None:
    """A residual block, an attention block, or a single layer of the autoencoder."""
    if isinstance(module, iris.ResBlock):
        for layer, part in zip((module[0], module[2], module[3], module[5]), ("norm1", "conv1", "norm2", "conv2")):
            fill_module(layer, f"{name}.{part}")
    elif isinstance(module, iris.PixelAttention):
        fill_module(module.norm, f"{name}.norm")
        fill_module(module.qkv, f"{name}.q", f"{name}.k", f"{name}.v")
        fill_module(module.out, f"{name}.proj_out")
    else:
        fill_module(module, name)


def stage_names(prefix: str, level: int, blocks: int) -> list[str]:
    kinds = ("block", "attn") if level in (2, 3) else ("block",)
    return [f"{prefix}.{level}.{kind}.{i}" for i in range(blocks) for kind in kinds]


def encoder_names() -> list[str]:
    names = ["conv_in"]
    for level in range(5):
        names += stage_names("down", level, 2) + [f"down.{level}.downsample.conv"] * (level < 4)
    return [*names, "mid.block_1", "mid.attn_1", "mid.block_2", "norm_out", "conv_out"]


def decoder_names() -> list[str]:
    names = ["conv_in", "mid.block_1", "mid.attn_1", "mid.block_2"]
    for level in (4, 3, 2, 1, 0):
        names += stage_names("up", level, 3) + [f"up.{level}.upsample.conv"] * (level > 0)
    return [*names, "norm_out", "conv_out"]


def fill_tokenizer(tokenizer) -> None:
    for part, names in ("encoder", encoder_names()), ("decoder", decoder_names()):
        layers = [m for m in getattr(tokenizer, part) if not isinstance(m, (nn.SiLU, nn.Upsample, nn.ZeroPad2d))]
        for layer, name in zip(layers, names, strict=True):
            fill_block(layer, f"tokenizer.{part}.{name}")
    fill_module(tokenizer.pre_quant, "tokenizer.pre_quant_conv")
    fill_module(tokenizer.post_quant, "tokenizer.post_quant_conv")
    fill_embedding(tokenizer.codebook, "tokenizer.embedding")


def fill_lpips(lpips) -> None:
    for i, layer in lpips.convs.items():
        part = 1 + sum(int(i) > last for last in (3, 8, 15, 22))
        fill_module(layer, f"tokenizer.lpips.net.slice{part}.{i}")
    for i, layer in enumerate(lpips.heads):
        fill_module(layer, f"tokenizer.lpips.lin{i}.model.1")
        layer.weight.abs_()


def world_names(world) -> dict:
    """Module of ours -> its official names."""
    names = {world.norm: ["transformer.ln_f"], world.position: ["pos_emb"],
             world.action: ["embedder.embedding_tables.0"], world.token: ["embedder.embedding_tables.1"]}
    for i, block in enumerate(world.blocks):
        at = f"transformer.blocks.{i}"
        names |= {block.norm1: [f"{at}.ln1"], block.norm2: [f"{at}.ln2"], block.out: [f"{at}.attn.proj"],
                  block.qkv: [f"{at}.attn.{x}" for x in ("query", "key", "value")],
                  block.mlp[0]: [f"{at}.mlp.0"], block.mlp[2]: [f"{at}.mlp.2"]}
    for head, name in (world.token_head, "observations"), (world.reward_head, "rewards"), (world.end_head, "ends"):
        names |= {head[i]: [f"head_{name}.head_module.{i}"] for i in (0, 2)}
    return names


def fill_world(world) -> None:
    for module, names in world_names(world).items():
        names = [f"world_model.{name}" for name in names]
        fill_embedding(module, *names, 0.5) if isinstance(module, nn.Embedding) else fill_module(module, *names)


@torch.no_grad()
def fill_behaviour(behaviour) -> None:
    for i, layer in enumerate(behaviour.convs):
        fill_module(layer, f"actor_critic.conv{i + 1}")
    for name, weight in behaviour.lstm.named_parameters():
        bound = 0.1 if weight.dim() == 1 else math.sqrt(3 / weight.shape[1])
        weight.copy_(fill(f"actor_critic.lstm.{name}", weight.shape, bound))
    fill_module(behaviour.actor, "actor_critic.actor_linear")
    fill_module(behaviour.critic, "actor_critic.critic_linear")


@pytest.fixture(scope="module")
def agent():
    """The official sizes with filled weights, float64."""
    agent = iris.Agent({"image": (64, 64, 3)}, A, True, iris.Args(precision="fp32"))
    fill_tokenizer(agent.tokenizer)
    fill_world(agent.world)
    fill_behaviour(agent.behaviour)
    return agent.double()


@pytest.fixture(scope="module")
def lpips():
    lpips = iris.LPIPS()
    fill_lpips(lpips)
    return lpips.double()


def smooth(name: str, *shape: int) -> torch.Tensor:
    """Random frames, averaged 9 x 9 with padding that counts, stretched to [0,1]."""
    x = fill(name, shape, 0.5) + 0.5
    x = F.avg_pool2d(x.flatten(0, -4), 9, 1, 4).view(shape)
    return ((x - x.min()) / (x.max() - x.min())).double()


@pytest.fixture(scope="module")
def pictures():
    return smooth("tok_x", 2, 3, 64, 64)


def greedy(world, batch: int, horizon: int) -> dict:
    """Noise for which every draw is the mode."""
    steps = horizon - 1
    shapes = dict(action=(horizon, batch, A), token=(steps, world.tokens, batch, world.args.vocab_size),
                  reward=(steps, batch, 3), end=(steps, batch, 2))
    return {k: torch.ones(shape) for k, shape in shapes.items()}


def test_fill():
    close(fill("check", (5,), 1.0), "fill/check_name_check_shape5_bound1")


# ---- tokenizer ----


def test_vector_quantisation():
    args = iris.Args(code_dim=8, vocab_size=6, channels=2, res_blocks=1)
    tokenizer = iris.Tokenizer(3, args).double()
    z, words = given("vq/z").requires_grad_(), given("vq/codebook")
    tokenizer.codebook.weight = nn.Parameter(words)
    through = []

    def decoder(x):
        through.append(x)
        return x[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)

    tokenizer.embed, tokenizer.reconstruct = (lambda frames: z), decoder
    losses, _ = tokenizer.loss(given("vq/x01"))
    tokens = tokenizer.encode(given("vq/x01"))
    same(tokens, "vq/tokens")
    close(tokenizer.words(tokens), "vq/z_q")
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
    distance = (z.flatten(2).mT[:, :, None] - tokenizer.codebook.weight).norm(dim=-1).sort(-1)[0]
    close((distance[..., 1] - distance[..., 0]).min(), "tok/min_margin", 1e-3)
    recon = tokenizer.reconstruct(tokenizer.words(tokens))
    close(recon[..., ::8, ::8], "tok/rec_strided", 1e-3)
    close(torch.stack([recon.mean(), recon.std()]), "tok/rec_mean_std", 1e-3)
    close(((recon + 1) / 2)[..., ::8, ::8], "tok/encode_decode_strided", 1e-3)
    assert torch.allclose(tokenizer.decode(tokens), ((recon + 1) / 2).clamp(0, 1)), "and clamped for its consumers"
    losses, _ = tokenizer.loss(pictures, lpips)
    close(losses["codebook"] + losses["commit"], "tok/loss_commitment_loss", 1e-3)
    close(losses["image"], "tok/loss_reconstruction_loss", 1e-3)
    close(losses["perceptual"], "tok/loss_perceptual_loss", 1e-3)
    sum(losses.values()).backward()
    parts = [tokenizer.encoder, tokenizer.pre_quant, tokenizer.codebook, tokenizer.post_quant, tokenizer.decoder]
    close(torch.stack([norm(part) for part in parts]), "tok/grad_norms", 1e-3)
    tokenizer.zero_grad()


def norm(module: nn.Module) -> torch.Tensor:
    return torch.stack([p.grad.norm() for p in module.parameters()]).norm()


def test_lpips(lpips, pictures):
    x = 2 * pictures - 1
    close(lpips(x, x.flip(0)), "lpips/value", 1e-3)
    inner = lpips.features(x)
    close(torch.stack([feature.mean() for feature in inner]), "lpips/feature_means", 1e-3)


# ---- world model ----


def read_rows(tokens: int, blocks: int) -> dict[str, torch.Tensor]:
    """Which positions of whole blocks are embedded as actions or as tokens, and which the token head reads."""
    args = iris.Args(layers=0, heads=1, width=2, vocab_size=2, batch_length=blocks, dropout=0.0)
    world = iris.WorldModel(tokens, 2, args)
    nn.init.constant_(world.action.weight, 1.0), nn.init.constant_(world.token.weight, 2.0)
    seen = []
    world.forward = lambda x, dropout: seen.append(x) or torch.arange(x.shape[1]).view(1, -1, 1)
    world.token_head = world.reward_head = world.end_head = nn.Identity()
    pred, reward, end = world.logits(torch.zeros(1, blocks, tokens).long(), torch.zeros(1, blocks).long())
    assert torch.equal(reward, end)
    kinds = seen[0][0, :, 0]
    assert torch.equal(torch.where(kinds == 1)[0], reward.flatten()), "both heads read at the actions"
    return dict(act=torch.where(kinds == 1)[0], obs=torch.where(kinds == 2)[0], pred=pred.flatten())


def test_slicer():
    """Whole segments: what `logits` embeds and reads. Pieces of a sequence: those of its positions in the piece."""
    for name in [name for name in GOLDEN if name.startswith("slicer/")]:
        kind, size, count, past = name.removeprefix("slicer/").split("_")
        size, count, past = int(size[1:]), int(count[1:]), int(past[1:])
        rows = read_rows(size - 1, -(-(count + past) // size))[kind]
        same(rows[(past <= rows) & (rows < past + count)] - past, name)


def test_slicer_in_dreams():
    """Each pass of a dream reads its last output only: rewards at the action, tokens where one is predicted."""
    args = iris.Args(layers=1, heads=1, width=2, vocab_size=2, batch_length=3, dropout=0.0)
    world, passes, reads = iris.WorldModel(K, 2, args), [], []
    forward = world.forward
    world.forward = lambda x, start, cache: passes.append((x.shape[1], start)) or forward(x, start, cache)
    for name in ("token", "reward"):
        head = getattr(world, f"{name}_head")
        head.register_forward_hook(lambda *_, name=name: reads.append((name, passes[-1])))
    dream = iris.Dream(world, torch.zeros(1, K).long())
    for _ in range(2):
        dream.step(torch.zeros(1).long(), {k: v[0] for k, v in greedy(world, 1, 2).items()})
    assert passes == [(17, 0), *[(1, 17 + k) for k in range(15)], (2, 32), *[(1, 34 + k) for k in range(15)]]
    for count, past in passes:
        for kind, head in ("act", "reward"), ("pred", "token"):
            name = f"slicer/{kind}_k17_n{count}_p{past}"
            if name in GOLDEN:
                last = expected(name).tolist()[-1:]
                assert ((head, (count, past)) in reads) == (last == [count - 1]), name


@pytest.fixture()
def tiny_world():
    args = iris.Args(layers=2, heads=2, width=8, vocab_size=11, batch_length=4, dropout=0.0)
    world = iris.WorldModel(4, 3, args).double()
    with torch.no_grad():
        for module, names in world_names(world).items():
            for kind, weight in module.named_parameters(recurse=False):
                weight.copy_(torch.cat([given(f"tinywm/w/{name}.{kind}") for name in names]))
    return world


def embedded(world, blocks: torch.Tensor) -> torch.Tensor:
    """(B,L*(K+1)) as the official code has it -> (B,L*(K+1),W)."""
    blocks = blocks.unflatten(1, (-1, world.tokens + 1))
    return torch.cat([world.token(blocks[..., :-1]), world.action(blocks[..., -1:])], 2).flatten(1, 2)


def test_tiny_world(tiny_world):
    world, blocks = tiny_world, given("tinywm/tokens")
    x = embedded(world, blocks)
    output = world(x)
    close(output, "tinywm/output_sequence", 1e-5)
    cache = world.empty_cache(2)
    pieces = [world(x[:, :4], 0, cache), *(world(x[:, i : i + 1], i, cache) for i in range(4, 20))]
    close(torch.cat(pieces, 1), "tinywm/incremental_output_sequence", 1e-5)
    assert (torch.cat(pieces, 1) - output).abs().max() < 1e-12
    split = blocks.unflatten(1, (4, 5))
    tokens, action = split[..., :4], split[..., 4]
    for logits, name in zip(world.logits(tokens, action), ("observations", "rewards", "ends")):
        close(logits, f"tinywm/logits_{name}", 1e-5)
    reward, end, mask = (given(f"tinywm/batch_{k}").T for k in ("rewards", "ends", "mask_padding"))
    batch = dict(tokens=tokens.transpose(0, 1), action=action.T, reward=reward, end=end.bool())
    losses, _ = world.loss(batch, mask, 0.0)
    for ours, name in ("token", "obs"), ("reward", "rewards"), ("end", "ends"):
        close(losses[ours], f"tinywm/loss_{name}", 1e-5)
    sum(losses.values()).backward()
    key = world.blocks[0].qkv.weight.grad[8:16]
    close(key, "tinywm/grad/transformer.blocks.0.attn.key.weight", 1e-5)
    close(world.position.weight.grad, "tinywm/grad/pos_emb.weight", 1e-5)
    close(world.action.weight.grad, "tinywm/grad/embedder.embedding_tables.0.weight", 1e-5)
    close(world.token.weight.grad, "tinywm/grad/embedder.embedding_tables.1.weight", 1e-5)
    close(world.reward_head[2].weight.grad, "tinywm/grad/head_rewards.head_module.2.weight", 1e-5)


def test_labels(tiny_world, monkeypatch):
    """The labels as cross_entropy gets them; where the mask is false the official ones say -100."""
    seen, split = [], given("tinywm/tokens").unflatten(1, (4, 5))
    reward, end, mask = (given(f"tinywm/batch_{k}").T for k in ("rewards", "ends", "mask_padding"))
    original, means = F.cross_entropy, []
    monkeypatch.setattr(iris.F, "cross_entropy", lambda x, y, **kw: seen.append(y) or original(x, y, **kw))
    mean = iris.masked_mean
    monkeypatch.setattr(iris, "masked_mean", lambda x, m: means.append(m) or mean(x, m))
    batch = dict(tokens=split[..., :4].transpose(0, 1), action=split[..., 4].T, reward=reward, end=end.bool())
    tiny_world.loss(batch, mask, 0.0)
    for labels, valid, name in zip(seen, means, ("observations", "rewards", "ends")):
        same(torch.where(valid, labels, -100).flatten(), f"tinywm/labels_{name}")


def test_world_model(agent):
    world = agent.world
    tokens = torch.from_numpy(uniforms(91, 2 * 20 * K) * 512).long().view(2, 20, K)
    action = torch.from_numpy(uniforms(92, 2 * 20) * A).long().view(2, 20)
    logits = world.logits(tokens, action)
    close(logits[0][:, -K:, :8], "wm/logits_obs_first8_lastblock", 1e-3)
    close(logits[1], "wm/logits_rewards", 1e-3)
    close(logits[2], "wm/logits_ends", 1e-3)
    reward, end, mask = (given(f"wm/{k}").T for k in ("rewards", "ends", "mask_padding"))
    batch = dict(tokens=tokens.transpose(0, 1), action=action.T, reward=reward, end=end.bool())
    losses, _ = world.loss(batch, mask, 0.0)
    for ours, name in ("token", "obs"), ("reward", "rewards"), ("end", "ends"):
        close(losses[ours], f"wm/loss_{name}", 1e-3)
    sum(losses.values()).backward()
    close(norm(world), "wm/grad_norm_total", 1e-3)
    world.zero_grad()


def test_optimizer_groups(agent):
    """Ours has query, key and value in one matrix per block: two tensors fewer in each group."""
    groups = iris.Optimizers(agent, agent.args).parts["world"].param_groups
    fused = 2 * len(agent.world.blocks)
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    sizes = [n for group in groups for n in (len(group["params"]) + fused, sum(p.numel() for p in group["params"]))]
    same(sizes, "optim/wm_group_sizes")


# ---- behaviour ----


@pytest.mark.parametrize("gamma, lam", [(0.995, 0.95), (0.9, 0.5)])
def test_lambda_return(gamma, lam):
    reward, value, end = (given(f"lambda/{k}").T for k in ("rewards", "values", "ends"))
    ret = iris.lambda_return(reward[:-1], value, end[:-1].bool(), gamma, lam)
    close(torch.cat([ret, value[-1:]]).T, f"lambda/returns_g{gamma}_l{lam}")


def test_actor_critic(agent):
    frames = smooth("ac_frames", 3, 7, 3, 64, 64).transpose(0, 1)
    close(frames.transpose(0, 1)[:, :, 0, ::32, ::32], "ac/frames_check")
    policy, mask = agent.behaviour, given("ac/mask_padding").T
    _, _, state = policy(frames[:4], policy.initial(3, CPU), mask)
    close(state[0][:, :8], "ac/hx_after_burnin_first8", 1e-4)
    close(state[1][:, :8], "ac/cx_after_burnin_first8", 1e-4)
    logits, value, _ = policy(frames[4:], state)
    close(logits.transpose(0, 1), "ac/logits", 1e-4)
    close(value.T, "ac/values", 1e-4)


def test_actor_critic_losses(agent):
    logits, value = given("acloss/logits").requires_grad_(), given("acloss/values").requires_grad_()
    action, reward, end = (given(f"acloss/{k}").T for k in ("actions", "rewards", "ends"))
    losses = behaviour_losses(agent, logits.transpose(0, 1), value.T, action=action, reward=reward[:-1], end=end[:-1])
    for ours, name in ("policy", "actions"), ("value", "values"), ("entropy", "entropy"):
        close(losses[ours], f"acloss/loss_{name}")
    grads = torch.autograd.grad(sum(losses.values()), (logits, value))
    close(grads[0], "acloss/grad_logits")
    close(grads[1], "acloss/grad_values")


@pytest.fixture(scope="module")
def dreamer(agent, pictures):
    """Heads scaled up, so that modes are clear; 21 frames that roll, of which the second sample lacks the first 8."""
    heads = [agent.world.token_head[2], agent.world.reward_head[2], agent.world.end_head[2], agent.behaviour.actor]
    scales = (20, 20, 20, 30)
    with torch.no_grad():
        for layer, scale in zip(heads, scales):
            layer.weight *= scale
    mask = given("imagine/mask_padding").T
    frames = torch.stack([pictures.roll(3 * i, -1) for i in range(21)]) * mask[..., None, None, None]
    with torch.no_grad():
        tokens = torch.stack([agent.tokenizer.encode(x) for x in frames])
    agent.float()
    with torch.no_grad():
        recon = torch.stack([agent.tokenizer.decode(x) for x in tokens])
    yield SimpleNamespace(agent=agent, recon=recon, tokens=tokens[-1], mask=mask)
    agent.double()
    with torch.no_grad():
        for layer, scale in zip(heads, scales):
            layer.weight /= scale


def watch_dreams(monkeypatch) -> list[tuple]:
    """(size before, size after, tokens after) of every step."""
    steps, step = [], iris.Dream.step

    def watched(self, *args, **kwargs):
        before = size(self)
        result = step(self, *args, **kwargs)
        steps.append((before, size(self), self.tokens))
        return result

    monkeypatch.setattr(iris.Dream, "step", watched)
    return steps


def test_imagine(dreamer, monkeypatch):
    """The official code also gives the last action to the world model; its reward and end enter no loss."""
    agent, steps, dreams, init = dreamer.agent, watch_dreams(monkeypatch), [], iris.Dream.__init__
    monkeypatch.setattr(iris.Dream, "__init__", lambda self, *args: dreams.append(self) or init(self, *args))
    noise = greedy(agent.world, 2, 20)
    out = agent.dream(dict(noise, recon=dreamer.recon, mask=dreamer.mask, tokens=dreamer.tokens))
    dream, world = dreams[0], agent.world
    with torch.no_grad():
        action = world.action(out["action"][-1])[:, None]
        y, before = dream.forward(torch.cat([world.token(dream.waiting), action], 1)), dream.written
    last = world.reward_head(y).argmax(-1) - 1, world.end_head(y).argmax(-1)
    steps.append((before - 1, before, None))
    reward, end = (torch.cat([out[k], x[None]]) for k, x in zip(("reward", "end"), last))
    same(out["action"].T, "imagine/actions")
    same(reward.T, "imagine/rewards")
    same(end.T, "imagine/ends")
    same(torch.stack([tokens for *_, tokens in steps[:19]], 1), "imagine/tokens")
    same([step[:2] for step in steps], "imagine/kv_sizes_before_after")
    strided = (out["frames"].transpose(0, 1)[..., ::16, ::16] * 255)
    levels = (strided - expected("imagine/observations_strided")).abs()
    assert levels.max() <= 1.01, "to one gray level: the official array is truncated"
    logits, value, _ = agent.behaviour(out["frames"], (out["hidden"], out["cell"]))
    close(logits.transpose(0, 1), "imagine/logits_actions", 1e-3)
    close(value.T, "imagine/values", 1e-3)
    margin = logits.sort(-1)[0]
    assert (margin[..., -1] - margin[..., -2]).min() >= expected("imagine/min_argmax_margin") - 1e-5
    losses, _ = agent.behaviour.loss(out)
    for ours, name in ("policy", "actions"), ("value", "values"), ("entropy", "entropy"):
        close(losses[ours], f"imagine/loss_{name}", 1e-3)
    sum(losses.values()).backward()
    for name, p in agent.behaviour.named_parameters():
        for ours, theirs in ("actor.", "actor_linear."), ("critic.", "critic_linear."):
            name = name.replace(ours, theirs)
        name = f"conv{int(name[6]) + 1}{name[7:]}" if name.startswith("convs") else name
        close(p.grad.norm(), f"imagine/grad_norm/{name}", 1e-3)
    agent.behaviour.zero_grad()


def test_imagine_beyond_the_context(dreamer, monkeypatch):
    """Horizon 23: after 19 steps the memory is cut down to one frame."""
    agent, steps = dreamer.agent, watch_dreams(monkeypatch)
    noise = greedy(agent.world, 2, 23)
    out = agent.dream(dict(noise, recon=dreamer.recon, mask=dreamer.mask, tokens=dreamer.tokens))
    _, value, _ = agent.behaviour(out["frames"], (out["hidden"], out["cell"]))
    same(out["action"].T, "imagine/actions_h23")
    close(value.T, "imagine/values_h23", 1e-3)
    sizes = expected("imagine/kv_sizes_before_after_h23").tolist()
    assert [list(step[:2]) for step in steps] == sizes[:22] and len(sizes) == 23
    assert sizes[22] == [steps[-1][1], steps[-1][1] + 1], "the last action, which needs no next frame"


# ---- environment and replay ----


def test_resize():
    """Official: the frames are resized, then the maximum of two is taken."""
    seed = int(given("env/raw_seed"))
    raw = np.floor(256 * uniforms(seed, 4 * 210 * 160 * 3)).astype(np.uint8).reshape(4, 210, 160, 3)
    raw = raw[:, ::7, ::5].repeat(7, 1).repeat(5, 2)
    assert np.array_equal(raw[:, ::70, ::50], expected("env/raw_check").numpy())
    envs, zero = object.__new__(iris.Envs), np.zeros(2)
    vars(envs).update(size=64, atari=True, images=["obs"], vectors=[], over=zero > 0, ret=zero, length=zero)
    small = envs._row(raw[2:, None], zero, zero > 0, zero > 0)["image"].astype(int)
    for ours, name in (small[1], "env/resized_last"), (small.max(0), "env/max_of_last_two_resized"):
        assert np.abs(ours - expected(name).numpy()).max() <= 1, name


def test_segments(tmp_path):
    """One episode of seven steps, whose last one is its end."""
    specs = iris.replay_specs({"image": (1,)}, None, None)
    replay = iris.SegmentReplay(specs, 20, 1, CPU, tmp_path)
    for t in range(7):
        row = dict(image=torch.full((1, 1), t), is_last=[False])
        replay.add(row, np.zeros(1), dict(reward=np.zeros(1), is_last=np.array([t == 6])))
    replay.refresh()
    first, frames, env = replay.table.T
    for name in {name.rsplit("_", 1)[0] for name in GOLDEN if name.startswith("segment/")}:
        start, stop = (int(part[1:]) for part in name.removeprefix("segment/").split("_"))
        batch, mask = replay.segment(first, frames, env, start, stop - start, "image end")
        same(batch["image"][:, 0, 0], f"{name}_obs")
        same(mask[:, 0], f"{name}_mask")
        same(batch["end"][:, 0], f"{name}_ends")


def test_every_array_is_used():
    assert INPUTS | COMPARED == set(GOLDEN), set(GOLDEN) - INPUTS - COMPARED
    assert not INPUTS & COMPARED
