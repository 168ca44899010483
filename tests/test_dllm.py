"""What only DLLM has: words in the world model, goals and what they pay, novelty, phrase books, which row
meets which. What it shares with DreamerV3 is tested there. At the end, breakages that the tests must see."""
import itertools
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import pytest
import test_golden_dllm
import torch
import torch.nn.functional as F
from conftest import load
from envs import Scripted
from test_dreamer_v3 import CPU, HostReads, latents, relative, shake, split
from test_golden_dreamer_v3 import float64
from torch import nn

m = load("dllm")
T, B, H, A, G = 6, 3, 4, 3, 4  # G goals in a row
D = 512  # of size1m
E = 384
SHAPES = {"image": (16, 16, 3), "vector": (2, 1, 2)}
CAPTIONS = ("do nothing", "collect wood", "eat cow", "attack zombie", "sleep")
GOALS = ("collect wood", "eat cow", "place table", "drink water", "wake up", "collect coal")


def make_agent(discrete=True, **flags):
    """Every path carries a gradient; two-hot heads favour bins near 0, so that values are about 1."""
    torch.manual_seed(0)
    small = dict(
        batch_size=B, batch_length=T, imag_horizon=H, free_nats=0.0, precision="fp32", num_goals=G,
        embedder="hashing", match_threshold=0.5)
    agent = shake(m.Agent(SHAPES, A, discrete, m.Args(size="size1m", **small | flags)), 0.1)
    for head in (agent.world.reward, agent.behaviour.critic, agent.behaviour.slow_critic):
        head[-1].bias.data -= 3 * torch.linspace(-20, 20, 255).abs()
    for phrase in CAPTIONS:
        agent.captions.number(phrase)
    for phrase in GOALS:
        agent.goals.number(phrase)
    return agent


def make_batch(agent, seed=1):
    """Replay rows (T+1,B,...) with embeddings, novelty; column 0 terminates at row 2, some goals are -1."""
    torch.manual_seed(seed)
    lead = (T + 1, B)
    flags = {name: torch.zeros(lead, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")}
    flags["is_first"][0] = True
    flags["is_last"][2, 0] = True
    flags["is_terminal"][2, 0] = True
    flags["is_first"][3, 0] = True
    return agent.look_up(dict(
        flags,
        image=torch.randint(256, (*lead, 16, 16, 3), dtype=torch.uint8),
        vector=torch.randn(*lead, 5),
        caption=torch.randint(len(CAPTIONS), lead, dtype=torch.int32),
        goals=torch.randint(-1, len(GOALS), (*lead, G), dtype=torch.int32),
        novelty=2 * torch.randn(*lead, G),
        reward=torch.randn(lead),
        action=torch.eye(A)[torch.randint(A, lead)],
        deter=torch.randn(*lead, D),
        stoch=latents(*lead)))


def embed(phrase):
    return torch.as_tensor(m.HashingEmbedder()(m.normalize(phrase))).to(torch.get_default_dtype())


# ---- what a dream is paid ----


class Words(nn.Module):
    """A language head that says phrases[n] in states whose h is n."""

    def __init__(self, phrases):
        super().__init__()
        self.raw = torch.stack([m.symlog(embed(phrase)) for phrase in phrases])
        self.calls = []

    def forward(self, feat):
        self.calls.append(feat.shape[:-1])
        return self.raw[feat[..., 0].long()]


def int_reward(phrases, goals, novelty, **flags):
    """What a dream of states 0 to H, in which these phrases are said, is paid for entering them (H+1,). The
    predicted reward is 0; the row where it begins has these goals."""
    agent = make_agent(num_goals=len(goals), **flags)
    world = agent.world
    world.language = Words(phrases)
    world.rssm.imagine_step = lambda deter, stoch, action: (deter + 1, stoch)
    world.predict_reward = lambda feat: torch.zeros(feat.shape[:-1])
    numbers = torch.tensor([[[agent.goals.number(goal) for goal in goals]]], dtype=torch.int32)
    rows = agent.look_up(dict(
        goals=numbers, caption=torch.zeros(1, 1, dtype=torch.int32), reward=torch.zeros(1, 1),
        novelty=torch.tensor([[novelty]])))
    seen = []
    lambda_return = m.lambda_return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "lambda_return", lambda *args: seen.append(args[0]) or lambda_return(*args))
        agent.behaviour.loss(world, dict(deter=torch.zeros(1, 1, D), stoch=latents(1, 1)), rows)
    return [round(x, 5) for x in seen[0][:, 0].tolist()]


def said_at(state, phrase="collect wood", other="move"):
    phrases = [other] * (H + 1)
    phrases[state] = phrase
    return phrases


@pytest.mark.parametrize("state", range(H + 1))
def test_a_goal_is_paid_in_the_state_where_it_is_reached(state):
    """Also in state H, the last one; not in the replayed state 0."""
    wanted = [0.0] * (H + 1)
    if state > 0:
        wanted[state] = 3.0
    assert int_reward(said_at(state), ["eat cow", "collect wood"], [2.0, 3.0]) == wanted


def test_a_goal_is_paid_once_unless_repeated():
    phrases = ["collect wood", "move", "collect wood", "eat cow", "collect wood"]
    goals, novelty = ["collect wood", "eat cow"], [1.0, 2.0]
    assert int_reward(phrases, goals, novelty) == [0, 0, 1, 2, 0]
    assert int_reward(phrases, goals, novelty, goal_hit="repeat") == [0, 0, 1, 2, 1]
    assert int_reward(phrases, goals, novelty, goal_hit="peak") == [0, 0, 1, 2, 1]  # ties are all paid
    assert int_reward(phrases, goals, novelty, intrinsic_scale=0.5) == [0, 0, 0.5, 1, 0]
    two = ["collect wood", "collect wood"]
    assert int_reward(phrases, two, novelty) == [0, 0, 3, 0, 0]
    assert int_reward(phrases, two, novelty, goal_reduce="max") == [0, 0, 2, 0, 0]


def test_a_close_phrase_pays_its_cosine_above_the_threshold():
    close = F.cosine_similarity(embed("collect coal"), embed("collect wood"), dim=0).item()
    assert 0.2 < close < 0.9
    dream = (said_at(1, "collect coal"), ["collect wood"], [1.0])
    assert int_reward(*dream, match_threshold=close - 0.01)[1] == pytest.approx(close, abs=1e-4)
    assert not any(int_reward(*dream, match_threshold=close + 0.01)), "a goal that is never reached"


def test_the_threshold_itself_is_not_enough():
    one = torch.ones(1, 1)
    for score, wanted in ((0.5, 0.0), (0.501, 0.501)):
        reward, _ = m.intrinsic_reward(torch.full((1, 1, 1), score), one, one > 0, 0.5)
        assert reward.item() == pytest.approx(wanted)


def test_novelty_is_bounded():
    known = (said_at(1), ["collect wood"], [-3.0])
    assert not any(int_reward(*known))
    assert int_reward(*known, novelty_floor=-float("inf"))[1] == -3, "as in the paper"
    assert int_reward(*known, novelty_floor=-float("inf"), goal_reduce="max")[1] == 0
    assert int_reward(said_at(1), ["collect wood"], [50.0])[1] == 10


def test_no_goal_pays_nothing():
    """Also where novelty has a floor, and the phrase is said that is looked up for -1, the first one."""
    agent = make_agent()
    first = agent.goals.phrases[0]
    assert not any(int_reward(said_at(2, first), [""], [3.0], novelty_floor=1.0))
    assert int_reward(said_at(2, first), ["", first], [3.0, 2.0]) == [0, 0, 2, 0, 0]


@float64
def test_scale_of_a_caption_and_order_of_goals_do_not_matter():
    torch.manual_seed(0)
    u_hat, goals = torch.randn(H, 50, 8), torch.randn(50, 5, 8)
    novelty, valid = torch.randn(50, 5), torch.rand(50, 5) > 0.3
    u_hat[:, :10] = 0

    def reward(u_hat, order=slice(None)):
        return m.intrinsic_reward(m.match(u_hat, goals[:, order]), novelty[:, order], valid[:, order], 0.3)[0]

    plain = reward(u_hat)
    assert plain.any() and not plain[:, :10].any() and plain.isfinite().all()
    assert relative(reward(3 * u_hat), plain) < 1e-12
    assert relative(reward(0.2 * u_hat), plain) < 1e-12
    assert relative(reward(u_hat, torch.randperm(5)), plain) < 1e-12


def test_a_dream_decodes_captions_alone_and_each_once():
    agent = make_agent()
    world = agent.world
    batch = make_batch(agent)
    rows, context = split(batch)
    _, post, _ = world.loss(rows, context)
    decoded = []
    counted = []
    world.decoder.register_forward_hook(lambda *call: decoded.append(call))
    world.language.register_forward_hook(lambda module, inputs, out: counted.append(out.shape[:-1]))
    agent.behaviour.loss(world, post, rows)
    assert not decoded
    assert counted == [(H, T * B)]


@float64
def test_losses_of_dreams_from_scratch():
    """On the dream that was dreamt: goals and novelty are those of the row where it began."""
    agent = make_agent(novelty_floor=-1.0, novelty_ceil=2.0, intrinsic_scale=0.7, match_threshold=0.02)
    world, behaviour = agent.world, agent.behaviour
    rows, context = split(make_batch(agent))
    _, post, _ = world.loss(rows, context)
    dream = {}
    imagine = behaviour.imagine

    def spied_imagine(*start):
        dream["feat"], dream["action"] = imagine(*start)
        return dream["feat"], dream["action"]

    behaviour.imagine = spied_imagine
    losses, reached, _ = behaviour.loss(world, post, rows)
    feat, action = dream["feat"], dream["action"]
    reward = m.twohot_mean(world.reward(feat), world.bins)
    u_hat = m.symexp(world.language(feat))
    wanted = torch.zeros(T, B, G, dtype=torch.bool)
    for t, b, k in itertools.product(range(T), range(B), range(G)):
        n = t * B + b
        number = rows["goals"][t, b, k]
        if number < 0:
            continue
        for step in range(1, H + 1):
            score = F.cosine_similarity(u_hat[step, n], agent.goals.embeds[number], dim=0)
            if score > 0.02:
                wanted[t, b, k] = True
                reward[step, n] += 0.7 * score * rows["novelty"][t, b, k].clip(-1, 2)
                break
    assert 0.1 < wanted.double().mean() < 0.7
    assert torch.equal(reached, wanted)

    value = m.twohot_mean(behaviour.critic(feat), world.bins)
    slow_value = m.twohot_mean(behaviour.slow_critic(feat), world.bins)
    cont = world.cont(feat)[..., 0].sigmoid()
    ret = [value[H]]
    for k in reversed(range(H)):
        ret.insert(0, reward[k + 1] + cont[k + 1] * (0.05 * value[k + 1] + 0.95 * ret[0]))
    ret = torch.stack(ret[:H])
    weight = cont.cumprod(0)[:H]
    policy = behaviour.policy(feat[:H])
    scale = max(1, 0.01 * (ret.quantile(0.95) - ret.quantile(0.05)))
    gain = (policy * action).sum(-1) * (ret - value[:H]) / scale + 3e-4 * m.entropy(policy)
    assert relative(losses["policy"], -weight * gain) < 1e-9
    logits = behaviour.critic(feat[:H])
    regression = m.twohot_loss(logits, ret, world.bins) + m.twohot_loss(logits, slow_value[:H], world.bins)
    assert relative(losses["value"], weight * regression) < 1e-9


def learn(intrinsic_scale):
    """Share of action 0, at the start of a dream, after a policy has been trained in a world where it makes
    the caption "collect wood", the goal, and action 1 makes "eat cow"; no other reward."""
    torch.manual_seed(0)
    args = m.Args(
        size="size1m", imag_horizon=3, num_goals=1, match_threshold=0.5, intrinsic_scale=intrinsic_scale)
    behaviour = m.Behaviour(4, 2, True, args)
    words = torch.stack([embed("collect wood"), embed("eat cow")])
    world = SimpleNamespace(
        rssm=SimpleNamespace(imagine_step=lambda deter, stoch, action: (action, stoch)),
        predict_reward=lambda feat: torch.zeros(feat.shape[:-1]),
        predict_cont=lambda feat: torch.full(feat.shape[:-1], 0.7),
        predict_caption=lambda feat: feat[..., :2] @ words)
    start = dict(deter=torch.zeros(1, 64, 2), stoch=torch.zeros(1, 64, 2))
    rows = dict(
        goals=torch.zeros(1, 64, 1), novelty=torch.ones(1, 64, 1), reward=torch.zeros(1, 64),
        goal_embed=words[:1].expand(1, 64, 1, E))
    adam = torch.optim.Adam([p for p in behaviour.parameters() if p.requires_grad], 3e-3)
    for _ in range(100):
        losses, _, _ = behaviour.loss(world, start, rows)
        adam.zero_grad()
        (losses["policy"].mean() + losses["value"].mean()).backward()
        adam.step()
    return behaviour.policy(torch.zeros(4))[0].exp().item()


def test_a_policy_learns_to_reach_its_goal():
    assert learn(1.0) > 0.9
    assert 0.3 < learn(0.0) < 0.7


# ---- words in the world model ----


@float64
def test_a_caption_reaches_the_posterior_of_its_own_step():
    """Not the prior of that step, and nothing before it."""
    agent = make_agent()
    results = []
    for number in (1, 2):
        batch = make_batch(agent)
        batch["caption"][4] = number
        rows, context = split(agent.look_up(batch))
        torch.manual_seed(4)
        deter, _, post_logits = agent.world.rssm.observe(agent.world.encoder(rows), **context)
        results.append((post_logits, agent.world.rssm.prior(deter)))
    (post, prior), (other_post, other_prior) = results
    step = 3  # of row 4
    assert torch.equal(post[:step], other_post[:step])
    assert torch.equal(prior[: step + 1], other_prior[: step + 1])
    assert relative(post[step], other_post[step]) > 1e-6


# official behaviour; dyn reaches the encoder through the samples of earlier steps
REACH = dict(
    image="encoder rssm decoder", vector="encoder rssm decoder", reward="encoder rssm reward",
    cont="encoder rssm cont", dyn="encoder rssm", rep="encoder rssm", language="encoder rssm language",
    policy="actor actor_mean", value="critic")


def reached_by(agent):
    """Names of the modules with a gradient that is not exactly zero."""
    parts = (agent.world, agent.behaviour, agent.rnd)
    modules = [(name, module) for part in parts for name, module in part.named_children()]
    names = set()
    for name, module in modules:
        if any(p.grad is not None and p.grad.any() for p in module.parameters()):
            names.add(name)
    return names


@pytest.mark.parametrize("language_loss", ["symlog_mse", "catxent"])
@pytest.mark.parametrize("loss", REACH)
@float64
def test_reach(loss, language_loss):
    """Backward of one loss alone: non-zero where the table says so, exactly zero elsewhere."""
    agent = make_agent(language_loss=language_loss, match_threshold=0.02)
    rows, context = split(make_batch(agent))
    losses, post, _ = agent.world.loss(rows, context)
    losses |= agent.behaviour.loss(agent.world, post, rows)[0]
    assert losses.keys() == REACH.keys()
    losses[loss].mean().backward()
    assert reached_by(agent) == set(REACH[loss].split())
    words = [p.grad for p in agent.world.encoder.language.parameters()]
    assert all(grad is not None and grad.any() for grad in words) == ("encoder" in REACH[loss])


@float64
def test_a_mixture_of_captions():
    """--language-loss catxent: rows without a caption take no part; u_hat is a mean of the others."""
    agent = make_agent(language_loss="catxent")
    world = agent.world
    feat = torch.randn(T, B, world.feat)
    raw = world.language(feat)[..., : len(CAPTIONS)]
    world.language[-1].bias.data[len(CAPTIONS) :] = 1e3
    probs = raw.softmax(-1)
    embeds = torch.stack([embed(caption) for caption in CAPTIONS])
    assert relative(world.predict_caption(feat), probs @ embeds) < 1e-9
    rows = dict(caption=torch.randint(len(CAPTIONS), (T, B), dtype=torch.int32))
    wanted = -probs.log().gather(-1, rows["caption"].long()[..., None])[..., 0]
    assert relative(world.language_loss(feat, rows), wanted) < 1e-9
    agent.captions.number("collect iron")  # a new caption takes part at once
    u_hat = world.predict_caption(feat)
    assert relative(u_hat, embed("collect iron").expand_as(u_hat)) < 1e-9


def test_captions_as_categories_are_of_one_process(monkeypatch):
    monkeypatch.setattr(m, "start_ranks", lambda device: (0, 2, CPU))
    args = m.Args(language_loss="catxent", num_envs=2, device="cpu")
    with pytest.raises(SystemExit):
        m.main(args)


# ---- novelty ----


def test_random_networks_at_first():
    rnd = m.RND(E, m.Args())
    assert sum(p.numel() for p in rnd.parameters()) == 1_444_864
    for network in (rnd.predictor, rnd.target):
        for layer in network[::2]:
            columns = layer.weight.T @ layer.weight
            assert torch.allclose(columns, 2 * torch.eye(len(columns)), atol=1e-4) and not layer.bias.any()
    assert not any(p.requires_grad for p in rnd.target.parameters())


def test_each_optimiser_moves_its_own(tmp_path):
    """The predictor moves by its own loss, all else by the joint one; the slow critic follows the critic."""
    for moved in ("rnd", "joint"):
        agent = make_agent(warmup=1, lr=1e-3 * (moved == "joint"), rnd_lr=1e-3 * (moved == "rnd"))
        optimizer = m.Optimizers(agent, agent.args)
        replay = random_replay(agent, tmp_path / moved)
        agent.behaviour.slow_critic.load_state_dict(agent.behaviour.critic.state_dict())
        m.train_step(agent, optimizer, replay, B)  # the joint optimiser's first step has learning rate 0
        before = {name: p.clone() for name, p in agent.named_parameters()}
        m.train_step(agent, optimizer, replay, B)
        changed = {name for name, p in agent.named_parameters() if not torch.equal(p, before[name])}
        predictor = {name for name in before if name.startswith("rnd.predictor")}
        target = {name for name in before if name.startswith("rnd.target")}
        assert changed == (predictor if moved == "rnd" else set(before) - predictor - target)


def on_ranks(*works):
    """Run functions as ranks, in threads, with `gather_ranks` and `average_ranks` between them -> results."""
    barrier = threading.Barrier(len(works))
    parts = [None] * len(works)
    results = [None] * len(works)
    number = threading.local()

    def gather(x):
        parts[number.rank] = x
        barrier.wait(60)
        joint = torch.cat(parts)
        barrier.wait(60)
        return joint

    def average(tensors):
        for x in tensors:
            x.copy_(gather(x[None].clone()).mean(0))

    def work(rank):
        number.rank = rank
        results[rank] = works[rank]()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "gather_ranks", gather)
        patch.setattr(m, "average_ranks", average)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


@pytest.mark.parametrize("norm", ["batch", "running", "slots"])
@float64
def test_novelty_of_two_ranks_is_that_of_the_joint_batch(norm):
    """Also where one has more empty places than the other; and the predictor learns the same."""
    torch.manual_seed(0)
    goals = torch.arange((T + 1) * 4 * G).view(T + 1, 4, G)
    book = SimpleNamespace(embeds=torch.randn(goals.numel(), E))
    goals[:, :2, 1:] = -1

    def prepare(*columns):
        torch.manual_seed(0)
        rnd = m.RND(E, m.Args(novelty_norm=norm, batch_length=T, num_goals=G))
        adam = torch.optim.SGD(rnd.predictor.parameters(), 0.1)  # as Adam would hide the gradient's scale
        share = dict(goals=goals[:, columns], goal_bank=book.embeds)

        def work():
            for _ in range(2):
                novelty, _ = m.learn_novelty(SimpleNamespace(rnd=rnd), adam, share)
            return [novelty, rnd.predictor[0].weight, rnd.mean, rnd.var, rnd.count]

        return work

    novelty, *joint = prepare(0, 1, 2, 3)()
    alone = [prepare(0, 1)(), prepare(2, 3)()]
    ranks = on_ranks(prepare(0, 1), prepare(2, 3))
    assert relative(torch.cat([rank[0] for rank in alone], 1), novelty) > 0.01
    assert relative(torch.cat([rank[0] for rank in ranks], 1), novelty) < 1e-9
    for _, *parts in ranks:
        for x, wanted in zip(parts, joint):
            assert relative(x, wanted) < 1e-9


# ---- phrase books ----


def make_book(**options):
    return m.PhraseBook(m.HashingEmbedder(), **options)


def test_a_phrase_has_one_number():
    book = make_book()
    texts = ("eat cow", "collect wood", "Eat the cow!", "", "the", "eat_cow")
    numbers = [book.number(text) for text in texts]
    assert numbers == [0, 1, 0, -1, -1, 0]
    assert book.phrases == ["eat cow", "collect wood"] and book.known == 2
    assert torch.equal(book.embeds[1], embed("collect wood")) and not book.embeds[2:].any()


def test_numbers_survive_the_file(tmp_path):
    path = tmp_path / "phrases.txt"
    book = make_book()
    book.keep_in(path)
    for phrase in ("eat cow", "collect wood", "eat cow", "sleep"):
        book.number(phrase)
    again = make_book()
    again.keep_in(path)
    assert again.phrases == book.phrases and torch.equal(again.embeds, book.embeds)
    assert again.number("sleep") == 2 and again.number("wake up") == 3
    third = make_book()
    third.keep_in(path)
    assert third.phrases == ["eat cow", "collect wood", "sleep", "wake up"] and third.known == 4


def test_a_book_grows():
    book = make_book(capacity=2)
    phrases = ("one", "two", "three", "four", "five")
    for number, phrase in enumerate(phrases):
        book.count(torch.tensor([number - 1]), "achieved", 1.0)
        assert book.number(phrase) == number
    assert torch.equal(book.embeds[:5], torch.stack([embed(phrase) for phrase in phrases]))
    assert len(book.tally) == len(book.embeds) == 8
    assert book.tally[:, 1].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_book_of_categories_does_not_grow():
    book = make_book(capacity=2, fixed=True)
    assert [book.number(phrase) for phrase in ("one", "two", "one")] == [0, 1, 0]
    with pytest.raises(SystemExit):
        book.number("three")


def test_tally():
    book = make_book(capacity=4)
    numbers = torch.tensor([[0, 2, -1], [2, 2, -1]], dtype=torch.int32)
    book.count(numbers, "drawn", 0.5)
    book.count(numbers, "reached", torch.tensor([[True, False, True], [True, True, True]]))
    book.count(numbers, "novelty", torch.tensor([[1.0, 2, 9], [3, -4, 9]]))
    columns = dict(zip(book.COLUMNS, book.tally.T.tolist()))
    assert columns == dict(
        proposed=[0] * 4, achieved=[0] * 4, drawn=[0.5, 0, 1.5, 0], reached=[1, 0, 2, 0],
        novelty=[1, 0, 1, 0])


def test_places_without_a_goal_have_the_error_of_zeros():
    """With `slots`, as in the official code, where such a goal is the vector 0, whose error begins at 0."""
    agent = make_agent(novelty_norm="slots")
    batch = make_batch(agent)
    batch["goals"] = torch.full_like(batch["goals"], -1)
    wanted = agent.rnd.error(torch.zeros_like(batch["goal_bank"][0])).item()
    m.learn_novelty(agent, m.Optimizers(agent, agent.args).rnd, batch)
    torch.testing.assert_close(agent.rnd.mean, torch.full_like(agent.rnd.mean, wanted), rtol=1e-3, atol=0)


def test_a_large_tally_still_grows():
    """A float32 of 16,384 does not notice 1/1024 at a time."""
    book = make_book(capacity=4)
    book.tally += 2**14
    for _ in range(4):
        book.count(torch.zeros(64, 16, 1, dtype=torch.long), "drawn", 1 / 1024)
    assert book.tally[0, 2] == 2**14 + 4


def test_an_optimiser_takes_its_settings_from_the_flags():
    """Also after a resume, which brings only its moments."""
    optimizers = [m.Optimizers(make_agent(rnd_lr=lr), m.Args(rnd_lr=lr, size="size1m")) for lr in (1e-3, 1e-5)]
    saved = optimizers[0].state_dict()
    saved["rnd"]["param_groups"][0]["capturable"] = True  # of a GPU
    optimizers[1].load_state_dict(saved)
    group = optimizers[1].rnd.param_groups[0]
    assert group["lr"] == 1e-5 and not group["capturable"]


def test_no_words_are_nothing_done():
    agent = make_agent()
    row = dict(image=torch.zeros(2, 16, 16, 3), vector=torch.zeros(2, 5), is_first=torch.ones(2) > 0)
    state = agent.act(row | dict(caption=["", "Sleep."]), agent.initial(2))
    assert state["caption"].tolist() == [CAPTIONS.index("do nothing"), CAPTIONS.index("sleep")]


# ---- update ----


def random_replay(agent, folder, rows=40):
    """Episodes of 9 rows."""
    torch.manual_seed(0)
    number = torch.arange(rows)
    first, last = number % 9 == 0, number % 9 == 8
    fields = dict(
        is_first=first, is_last=last, is_terminal=last, reward=torch.randn(rows),
        image=torch.randint(256, (rows, 16, 16, 3), dtype=torch.uint8), vector=torch.randn(rows, 5),
        caption=torch.randint(len(CAPTIONS), (rows,)), goals=torch.randint(-1, len(GOALS), (rows, G)),
        action=torch.eye(A)[torch.randint(A, (rows,))], deter=torch.randn(rows, D), stoch=latents(rows))
    replay = m.Replay(m.replay_specs(SHAPES, A, G, agent.world.rssm) | dict(
        image=((16, 16, 3), torch.uint8)), rows, 1, folder, CPU)
    for t in range(rows):
        replay.add({name: x[t][None] for name, x in fields.items()})
    return replay


def test_an_update_counts_its_goals(tmp_path):
    agent = make_agent(match_threshold=0.02)
    seen = {}
    loss = agent.loss

    def spied_loss(batch):
        seen["batch"], seen["result"] = batch, loss(batch)
        return seen["result"]

    agent.loss = spied_loss
    m.train_step(agent, m.Optimizers(agent, agent.args), random_replay(agent, tmp_path), B)
    goals, novelty = seen["batch"]["goals"][1:], seen["batch"]["novelty"][1:]
    reached = seen["result"][2]
    assert reached.any() and not reached[goals < 0].any()
    tally = dict(zip(agent.goals.COLUMNS, agent.goals.tally.T))
    for number in range(len(GOALS)):
        mine = goals == number
        wanted = dict(drawn=mine.sum(), reached=(mine & reached).sum(), novelty=novelty[mine].sum())
        for column, total in wanted.items():
            assert tally[column][number].item() == pytest.approx(total.item() / (T * B), abs=1e-5)


def test_an_update_reads_nothing_on_the_host(tmp_path):
    """But for Adam's own counter, which lies on the host."""
    agent = make_agent()
    optimizer = m.Optimizers(agent, agent.args)
    replay = random_replay(agent, tmp_path)
    m.train_step(agent, optimizer, replay, B)
    optimizer.rnd.step = lambda: None
    with HostReads() as mode:
        m.train_step(agent, optimizer, replay, B)
    assert not mode.found


# ---- which row meets which ----


class Diary(m.Captioner):
    """Words for envs.Scripted: a caption tells the step and the action that led to it, goals when they were
    asked for."""

    threshold = 0.9
    episode = 0

    def transition(self, action, reward, terminal, info):
        if action is None:
            self.episode += 1
            return "it begins"
        assert reward == self.env.steps
        return f"arrive at {self.env.steps} by {action + 1}"

    def state(self):
        return "somewhere"

    def goals(self, count):
        phrases = [f"asked at {self.env.steps} in episode {self.episode}", "it begins"]
        return phrases + ["arrive at 3 by 1"] * (self.env.steps < 10)


LENGTHS = itertools.cycle([13, 25, 7])
gymnasium.register("Diary-v0", lambda: Scripted(next(LENGTHS)))


def play(folder):
    """The replay of a run of main whose updates do nothing, and the agent."""
    seen = {}

    def train_step(agent, optimizer, replay, batch_size):
        seen.update(agent=agent, replay=replay)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "train_step", train_step)
        patch.setattr(m, "stop_signals", list)
        patch.setattr(m, "make_captioner", lambda args, env: Diary(env))
        m.main(m.parse_args([
            "--env-id=Diary-v0", f"--run-dir={folder}", "--num-envs=3", "--total-timesteps=200",
            "--device=cpu", "--size=size1m", "--batch-size=2", "--batch-length=8", "--eval-episodes=0",
            "--video-every=0", "--embedder=hashing", "--num-goals=4"]))
    return seen["replay"], seen["agent"]


def in_words(book, numbers):
    return [book.phrases[number] if number >= 0 else None for number in numbers.tolist()]


def test_rows_in_replay(tmp_path):
    """A caption tells what led to its row. Goals are asked for at steps 0, 10, 20, and hold until the next
    ones, or the end."""
    replay, agent = play(tmp_path)
    rows = {name: x[: replay.rows] for name, x in replay.data.items()}
    achieved = 0
    begun = 0
    proposals = 0
    for env in range(3):
        episode = 0
        for t in range(replay.rows):
            step, code, _ = (int(x) for x in rows["vector"][t, env])
            episode += step == 0
            begun += step == 0
            asked = step // 10 * 10
            proposals += step == asked
            third = "arrive at 3 by 1" if asked == 0 else None
            caption = "it begins" if step == 0 else f"arrive at {step} by {code}"
            achieved += caption == "arrive at 3 by 1"
            assert in_words(agent.captions, rows["caption"][t, env][None]) == [caption]
            assert in_words(agent.goals, rows["goals"][t, env]) == [
                f"asked at {asked} in episode {episode}", "it begins", third, None]
    assert agent.args.match_threshold == Diary.threshold
    tally = dict(zip(agent.goals.phrases, agent.goals.tally.tolist()))
    assert tally["arrive at 3 by 1"][:2] == [begun, achieved] and achieved > 0
    assert tally["it begins"][:2] == [proposals, 0], "a goal of the last episode is not reached by the next"


def test_rows_in_training(tmp_path):
    """Caption, goals, their novelty, reward, is_first of a step are of one row; row 0 lends its latents."""
    replay, agent = play(tmp_path)
    got = {}
    agent.world.loss = lambda rows, context: got.update(context=context) or ({}, {}, {})
    agent.behaviour.loss = lambda world, post, rows: got.update(rows=rows) or ({}, None, {})
    torch.manual_seed(0)
    batch, index = replay.sample(50, 9)
    batch = agent.look_up(batch)
    with torch.no_grad():
        error = agent.rnd.error(batch["goal_embed"])
    batch["novelty"], _ = m.learn_novelty(agent, torch.optim.Adam(agent.rnd.predictor.parameters()), batch)
    agent.loss(batch)
    rows, context = got["rows"], got["context"]
    step, code, _ = rows["vector"].unbind(-1)
    assert torch.equal(rows["reward"], step)
    assert torch.equal(rows["is_first"], step == 0)
    inside = step > 0
    assert torch.equal(context["prev_action"].argmax(-1)[inside] + 1, code[inside].long())
    assert torch.equal(context["deter"], replay.data["deter"].flatten(0, 1)[index[0]])
    for t, b in itertools.product(range(8), range(50)):
        at = int(step[t, b])
        caption = f"arrive at {at} by {int(code[t, b])}" if at else "it begins"
        assert torch.equal(rows["caption_embed"][t, b], embed(caption))
        asked = agent.goals.phrases[rows["goals"][t, b, 0]]
        assert asked.startswith(f"asked at {at // 10 * 10} in")
        assert torch.equal(rows["goal_embed"][t, b, 0], embed(asked))
    valid = batch["goals"] >= 0
    assert (rows["goals"][..., 3] == -1).all() and not rows["novelty"][..., 3].any()
    wanted = (error - error[valid].mean()) / error[valid].std(correction=0)
    torch.testing.assert_close(rows["novelty"][valid[1:]], wanted[1:][valid[1:]], rtol=1e-3, atol=1e-3)


def test_dreams_in_words(tmp_path):
    agent = make_agent(num_goals=G)
    replay = random_replay(agent, tmp_path)
    replay.data["goals"][:] = torch.tensor([agent.goals.number("eat cow"), -1, -1, -1])
    agent.world.language = Words(["collect wood", "sleep", "eat cow", "eat cow", "do nothing"])
    agent.world.rssm.imagine_step = lambda deter, stoch, action: (deter + 1, stoch)
    replay.data["deter"].zero_()
    text = m.dream_words(agent, replay, count=1)
    assert "goals: eat cow\n" in text
    assert text.splitlines()[-4:] == ["1. sleep", "2. eat cow → **eat cow**", "3. eat cow", "4. do nothing"]
    agent.goals.tally[0] = torch.tensor([4, 3, 2, 1, 5.0])
    assert "| collect wood | 4 | 3 | 50.0% | 2.50 |" in m.goal_table(agent.goals)


# ---- bf16 ----


@pytest.mark.parametrize("language_loss", ["symlog_mse", "catxent"])
def test_cosines_are_computed_in_float32(language_loss):
    """Of what the head says in bf16."""
    agent = make_agent(precision="bf16", language_loss=language_loss)
    batch = make_batch(agent)
    seen = {}
    match, intrinsic_reward = m.match, m.intrinsic_reward

    def spied_match(u_hat, goal_embed):
        seen.update(u_hat=u_hat, goal_embed=goal_embed)
        return match(u_hat, goal_embed)

    def spied_reward(score, *rest):
        seen["score"] = score
        seen["reward"], paid = intrinsic_reward(score, *rest)
        return seen["reward"], paid

    heads = []
    agent.world.language.register_forward_hook(lambda module, inputs, out: heads.append(out.double()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "match", spied_match)
        patch.setattr(m, "intrinsic_reward", spied_reward)
        agent.loss(batch)
    head = heads[-1]  # of the dream
    embeds = agent.captions.embeds[: len(CAPTIONS)].double()
    mixture = head[..., : len(CAPTIONS)].softmax(-1) @ embeds
    exact = mixture if language_loss == "catxent" else m.symexp(head)
    assert relative(seen["u_hat"].double(), exact) < 1e-5
    goals = seen["goal_embed"].double()
    score = F.cosine_similarity(seen["u_hat"].double()[:, :, None], goals, dim=-1)
    assert seen["score"].dtype == seen["reward"].dtype == torch.float32
    assert (seen["score"] - score).abs().max() < 1e-6


# ---- breakages, each of which a test above must see ----


def pay_one_step_late(patch, m):
    intrinsic_reward = m.intrinsic_reward

    def late(*args):
        reward, paid = intrinsic_reward(*args)
        return torch.cat([torch.zeros_like(reward[:1]), reward[:-1]]), paid

    patch.setattr(m, "intrinsic_reward", late)


def pay_the_start(patch, m):
    """States 0 to H-1 instead of 1 to H."""
    dream = {}
    imagine, predict_caption = m.Behaviour.imagine, m.WorldModel.predict_caption

    def remember(self, *start):
        dream["feat"], action = imagine(self, *start)
        return dream["feat"], action

    patch.setattr(m.Behaviour, "imagine", remember)
    patch.setattr(m.WorldModel, "predict_caption", lambda self, feat: predict_caption(
        self, dream["feat"][:-1]))


def pay_the_first_step_for_never(patch, m):
    def argmax(score, novelty, valid, threshold, hit="first", reduce="sum"):
        above = (score > threshold) & valid
        paid = F.one_hot(above.long().argmax(0), len(score)).movedim(-1, 0) > 0
        return torch.where(paid, score * novelty, 0).sum(-1), paid

    patch.setattr(m, "intrinsic_reward", argmax)


def pay_where_there_is_no_goal(patch, m):
    intrinsic_reward = m.intrinsic_reward
    patch.setattr(m, "intrinsic_reward", lambda score, novelty, valid, *rest: intrinsic_reward(
        score, novelty + 1, valid | True, *rest))


def measure_novelty_after_the_step(patch, m):
    learn_novelty = m.learn_novelty

    def late(agent, optimizer, batch):
        _, metrics = learn_novelty(agent, optimizer, batch)
        error = agent.rnd.error(batch["goal_bank"])[batch["goals"].long().clamp(min=0)]
        return agent.rnd.novelty(error.detach(), batch["goals"] >= 0), metrics

    patch.setattr(m, "learn_novelty", late)


def normalise_by_the_statistics_before(patch, m):
    merge = m.RND.merge

    def early(self, *batch):
        before = self.mean.clone(), self.var.clone()
        merge(self, *batch)
        return before

    patch.setattr(m.RND, "merge", early)


def statistics_of_the_own_share(patch, m):
    patch.setattr(m.RND, "novelty", lambda self, error, valid: torch.where(
        valid, (error - error[valid].mean()) / error[valid].std(correction=0), 0))


def cosines_in_bf16(patch, m):
    match = m.match
    patch.setattr(m, "match", lambda u_hat, goals: match(u_hat.bfloat16(), goals))


def keep_goals_at_a_reset(patch, m):
    step = m.Planner.step
    patch.setattr(m.Planner, "step", lambda self, row, *rest: step(
        self, dict(row, is_first=row["is_first"] & (self.age == 0)), *rest))


def caption_of_the_row_before(patch, m):
    look_up = m.Agent.look_up
    patch.setattr(m.Agent, "look_up", lambda self, batch: look_up(
        self, dict(batch, caption=batch["caption"].roll(1, 0))))


def goals_of_the_row_before(patch, m):
    loss = m.Behaviour.loss

    def shifted(self, world, post, rows):
        moved = {name: rows[name].roll(1, 0) for name in ("goals", "goal_embed")}
        return loss(self, world, post, rows | moved)

    patch.setattr(m.Behaviour, "loss", shifted)


def language_on_detached_states(patch, m):
    language_loss = m.WorldModel.language_loss
    patch.setattr(m.WorldModel, "language_loss", lambda self, feat, rows: language_loss(
        self, feat.detach(), rows))


def captions_that_nobody_has_said(patch, m):
    patch.setattr(m.WorldModel, "caption_logits", lambda self, feat: self.language(feat).log_softmax(-1))


def in_a_folder(test):
    """A test that takes a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        test(Path(folder))


def running_novelty():
    torch.set_default_dtype(torch.float64)
    try:
        test_golden_dllm.test_novelty_by_running_statistics()
    finally:
        torch.set_default_dtype(torch.float32)


MUTATIONS = {
    "paid one step late": (
        pay_one_step_late, lambda: test_a_goal_is_paid_in_the_state_where_it_is_reached(H)),
    "the start is paid": (pay_the_start, lambda: test_a_goal_is_paid_in_the_state_where_it_is_reached(0)),
    "never is the first step": (
        pay_the_first_step_for_never, test_a_close_phrase_pays_its_cosine_above_the_threshold),
    "no goal is paid": (pay_where_there_is_no_goal, test_no_goal_pays_nothing),
    "novelty after the step": (measure_novelty_after_the_step, running_novelty),
    "statistics of before": (normalise_by_the_statistics_before, running_novelty),
    "statistics of a rank": (
        statistics_of_the_own_share, lambda: test_novelty_of_two_ranks_is_that_of_the_joint_batch("batch")),
    "cosines in bf16": (cosines_in_bf16, lambda: test_cosines_are_computed_in_float32("symlog_mse")),
    "goals outlive their episode": (keep_goals_at_a_reset, lambda: in_a_folder(test_rows_in_replay)),
    "caption of the row before": (caption_of_the_row_before, lambda: in_a_folder(test_rows_in_training)),
    "goals of the row before": (goals_of_the_row_before, test_losses_of_dreams_from_scratch),
    "language loss on detached states": (
        language_on_detached_states, lambda: test_reach("language", "symlog_mse")),
    "captions that nobody has said": (captions_that_nobody_has_said, test_a_mixture_of_captions),
}
