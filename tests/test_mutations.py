"""Small breakages of the scripts, each of which must make the named check of another test file fail.

An entry: what breaks, a text that occurs exactly once in the script, what replaces it, the check, its arguments. If a
change of the script makes a text disappear, find the new one; the breakage stays the same."""
import functools
import importlib
import inspect
import io
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import test_index
import tiny
import torch
from conftest import ROOT, load

RETURN = "test_math:test_lambda_return_equals_its_definition"
ENDINGS = "test_gradients:test_replay_critic_at_episode_ends"
KL, SCALE = "test_gradients:test_kl_sides", "test_math:test_return_scale_starts_small_and_takes_all_returns_together"
REACH, SCAN = "test_gradients:test_reach", "test_math:test_hoisted_observe_equals_the_plain_scan"
TOTAL = "test_math:test_total_loss_and_which_critic_state_and_row_each_term_uses"
RESET = "test_consistency:test_nothing_crosses_a_reset"
IMAGINED = "test_golden_dreamer_v3:test_imagination_losses_discrete"
OPTIMISER = "test_golden_dreamer_v3:test_optimiser"
INITIAL, ACTING = "test_golden_dreamer_v3:test_initialisation", "test_consistency:test_acting_is_observing"
QUEUE, UNIFORM = "test_replay:test_online_queue", "test_replay:test_uniform_over_every_start"
ENCODER, CONTINUE = "test_golden_dreamer_v3:test_encoder", "test_golden_dreamer_v3:test_continue"
ROWS = "test_index:test_rows_in_replay"

MUTATIONS = dict(dreamer_v3=[
    # pure functions
    ("time flipped in the return", "torch.stack(rets[::-1])", "torch.stack(rets)", RETURN),
    ("reward of the state that is left", "step = reward[1:] +", "step = reward[:-1] +", RETURN),
    ("continue of the state that is left", "decay = live[1:] *", "decay = live[:-1] *", RETURN),
    ("bootstrap one step late", "(1 - lam[1:]) * value[1:]", "(1 - lam[1:]) * value[:-1]", RETURN),
    ("dyn trains the posterior", "categorical_kl(post.detach(), prior)", "categorical_kl(post, prior)", KL),
    ("rep trains the prior", "categorical_kl(post, prior.detach())", "categorical_kl(post, prior)", KL),
    ("KL sides exchanged", "return dyn.clamp(min=free_nats), rep.clamp(min=free_nats)",
     "return rep.clamp(min=free_nats), dyn.clamp(min=free_nats)", KL),
    ("free nats per group", "(log_p - log_q)).sum((-2, -1))", "(log_p - log_q)).sum(-1).clamp(min=1).sum(-1)",
     "test_math:test_free_nats_apply_to_the_sum_over_groups"),
    ("no uniform share in the KL", "post, prior = log_unimix(post_logits, mix)",
     "post, prior = log_unimix(post_logits, 0)", "test_golden_dreamer_v3:test_kl_losses"),
    ("sample not exactly one-hot", "onehot + (probs - probs.detach())", "onehot + probs - probs.detach()",
     "test_math:test_sample_is_onehot_and_its_gradient_that_of_the_mixed_probabilities"),
    ("Gumbel-softmax gradient", "onehot + (probs - probs.detach())",
     "onehot + ((g := (probs.log() - noise.log()).softmax(-1)) - g.detach())",
     "test_gradients:test_straight_through_gradient_is_that_of_the_probabilities"),
    ("exponential race upside down", "(probs.detach() / noise)", "(probs.detach() * noise)",
     "test_math:test_sample_frequencies"),
    ("two-hot weights exchanged", "picked[..., 0], picked[..., 1], weight", "picked[..., 1], picked[..., 0], weight",
     "test_golden_dreamer_v3:test_twohot", dict(dtype=torch.float64)),
    ("plain sum over the bins", "((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * bins[half + 1 :])",
     "(probs * bins)", "test_math:test_a_new_agent_predicts_zero_and_acts_at_random"),
    # replay
    ("newest sequences wait", "fresh, self.queue = valid[:batch_size], valid[batch_size:]",
     "fresh, self.queue = valid[-batch_size:], valid[:-batch_size]", QUEUE),
    ("a fresh sequence is given twice", "valid[:batch_size], valid[batch_size:]",
     "valid[:batch_size], valid[batch_size - 1 :]", QUEUE),
    ("online queue overlaps", "newest % length == 0", "newest % (length - 1) == 0", QUEUE),
    ("newest start never sampled", "(self.size - length + 1)).long()", "(self.size - length)).long()", UNIFORM,
     dict(count=37)),
    ("starts across the write head", "(self.size - length + 1)).long()", "(self.size - length + 2)).long()", UNIFORM,
     dict(count=37)),
    ("only the first environments", "(env * self.num_envs).long()", "(env * (self.num_envs - 1)).long()", UNIFORM,
     dict(count=12)),
    ("write-back into a copy", "field = self.data[name].flatten(0, 1)", "field = self.data[name].flatten(0, 1).clone()",
     "test_replay:test_latents_written_back_at_their_rows_only"),
    ("write-back one row early", "replay.write(index[1:]", "replay.write(index[:-1]",
     "test_consistency:test_update_writes_its_latents_back"),
    ("an abandoned episode goes on", "last[:-1] |= first[1:]", "last[1:] |= first[:-1]", "test_replay:test_annotate"),
    ("forced reset missing", "    first[0] = True\n", "", "test_replay:test_annotate"),
    ("no shift of the previous action", 'batch["action"][:-1])', 'batch["action"][1:])', ACTING, dict(discrete=True)),
    ("no shift of the previous action", 'batch["action"][:-1])', 'batch["action"][1:])',
     "test_index:test_training_sequences"),
    ("context latents dropped", 'deter=batch["deter"][0]', 'deter=0 * batch["deter"][0]', ACTING, dict(discrete=True)),
    # networks
    ("fan-in per block", "outputs // blocks), inputs)", "outputs // blocks), inputs // blocks)", INITIAL),
    ("truncation at 2 instead of 2 sigma", "-2 * sigma, 2 * sigma)", "-2, 2)", INITIAL),
    ("epsilon of a library", "F.rms_norm(at_least_float32(x), self.scale.shape, self.scale, 1e-4)",
     "F.rms_norm(at_least_float32(x), self.scale.shape, self.scale, 1e-6)", "test_golden_dreamer_v3:test_rms_norm"),
    ("norm in half precision", "F.rms_norm(at_least_float32(x)", "F.rms_norm(x",
     "test_consistency:test_norms_and_softmaxes_are_fp32_in_bf16"),
    ("vectors not squashed", "self.mlp(symlog(torch.cat([obs[k] for k in self.vectors], -1)))",
     "self.mlp(torch.cat([obs[k] for k in self.vectors], -1))", ENCODER),
    ("average instead of max", "F.max_pool2d", "F.avg_pool2d", ENCODER),
    ("mean over pixels", ".square().flatten(2).sum(-1)", ".square().flatten(2).mean(-1)",
     "test_golden_dreamer_v3:test_decoder"),
    ("upsampling phases shifted", "(p + k - 2) // 2 + 1 == a", "(p + k - 1) // 2 + 1 == a",
     "test_math:test_upsampling_convolution_by_phases"),
    # world model
    ("the action crosses a reset", "prev_action.to(dtype) * keep", "prev_action.to(dtype)", RESET),
    ("the state crosses a reset", "self.observe_step(weights, deter * k, stoch * k, a, x, e)",
     "self.observe_step(weights, deter, stoch, a, x, e)", RESET),
    ("no uniform share in the posterior sample", "stoch = sample_onehot(unimix(logits, self.mix)",
     "stoch = sample_onehot(unimix(logits, 0)", SCAN, dict(defer=False)),
    ("no uniform share in the dream", "sample_onehot(unimix(self.prior(deter), self.mix)",
     "sample_onehot(unimix(self.prior(deter), 0)", "test_consistency:test_dreaming_is_observing_without_tokens"),
    ("update gate opened", "(update - 1).sigmoid()", "(update + 1).sigmoid()", SCAN, dict(defer=False)),
    ("update gate inverted", "torch.lerp(blocks, cand,", "torch.lerp(cand, blocks,", SCAN, dict(defer=False)),
    ("large actions not scaled", "action / action.detach().abs().clamp(min=1)", "action", SCAN, dict(defer=False)),
    ("deferred bias gradient lost", "grad.sum(-2, keepdim=True) if ctx.has_bias",
     "0 * grad.sum(-2, keepdim=True) if ctx.has_bias", "test_math:test_deferred_weight_gradients"),
    ("gamma missing in the continue target", "target = (1 - obs[\"is_terminal\"].float()) * self.args.gamma",
     "target = 1 - obs[\"is_terminal\"].float()", CONTINUE),
    ("a time limit is a death", "target = (1 - obs[\"is_terminal\"]", "target = (1 - obs[\"is_last\"]", CONTINUE),
    # behaviour
    ("scale divided by a batch's own range", "self.low.lerp_(low, self.rate)", "self.low.copy_(low)", SCALE),
    ("scale with bias correction", "(self.high - self.low).clamp", "((self.high - self.low) / self.rate).clamp", SCALE),
    ("old and new exchanged in the average", "self.high.lerp_(high, self.rate)", "self.high.lerp_(high, 1 - self.rate)",
     SCALE),
    ("percentiles per time step", "torch.quantile(gather_ranks(ret.flatten()), self.levels)",
     "torch.quantile(ret.flatten(1), self.levels, dim=1).mean(1)", SCALE),
    ("w_0 = 1", "weight = cont.cumprod(0)[:-1]",
     "weight = torch.cat([torch.ones_like(cont[:1]), cont[1:-1]]).cumprod(0)",
     "test_gradients:test_dream_from_a_terminal_state_teaches_nothing"),
    ("slow critic as target", "ret = lambda_return(reward, value, cont", "ret = lambda_return(reward, slow_value, cont",
     IMAGINED, dict(mix=1)),
    ("sign of the actor loss", "policy=-weight *", "policy=weight *", IMAGINED, dict(mix=1)),
    ("sign of the entropy", "+ self.args.ent_coef * bonus", "- self.args.ent_coef * bonus", IMAGINED, dict(mix=1)),
    ("no uniform share in the policy", "Categorical(raw, self.args.actor_unimix)", "Categorical(raw, 0.0)", IMAGINED,
     dict(mix=1)),
    ("truncated rows train the critic", "return (1 - is_last[:-1].float()) * self.value_loss", "return self.value_loss",
     ENDINGS),
    ("truncation ends the replay return", "live = (1 - is_terminal.float())", "live = (1 - is_last.float())", ENDINGS),
    ("the return crosses an end", "(1 - is_last.float()) * self.args.lam", "torch.full_like(reward, self.args.lam)",
     ENDINGS),
    ("replay critic on detached states", 'feat = torch.cat([post["deter"], post["stoch"]], -1)',
     'feat = torch.cat([post["deter"], post["stoch"]], -1).detach()', REACH, dict(loss="repval", discrete=True)),
    ("the actor bends the continue head", "with torch.no_grad():  # the behaviour must",
     "if True:  # the behaviour must", REACH, dict(loss="policy", discrete=True)),
    ("the critic bends the dream", "@torch.no_grad()  # REINFORCE", "# REINFORCE", REACH,
     dict(loss="value", discrete=True)),
    ("gradient through the advantage", "advantage.detach()", "advantage",
     "test_gradients:test_targets_of_actor_and_critic_are_constants"),
    ("gradient through the return", "ret.detach(), self.bins", "ret, self.bins",
     "test_gradients:test_targets_of_actor_and_critic_are_constants"),
    ("slow critic wants gradients", "255, 0.0).requires_grad_(False)", "255, 0.0)",
     "test_gradients:test_slow_critic_has_no_gradient"),
    ("dreams handed to other sequences", "ret[0].unflatten(0, feat.shape[:2])", "ret[0].view(feat.shape[1], -1).T",
     "test_consistency:test_batch_elements_are_independent"),
    ("bootstrap with the last imagined return", "self.slow_value(feat), ret[0]", "self.slow_value(feat), ret[-1]",
     TOTAL),
    ("no slow critic in the value loss", " + twohot_loss(logits, slow_value.detach(), self.bins)", "", TOTAL),
    ("weights of dyn and rep exchanged", "dyn=self.args.beta_dyn, rep=self.args.beta_rep",
     "rep=self.args.beta_dyn, dyn=self.args.beta_rep", "test_gradients:test_total_gradient_is_the_weighted_sum"),
    # update
    ("warm-up one update early", "(self.count - 1) / self.warmup", "self.count / self.warmup",
     "test_math:test_first_update_changes_nothing_and_the_second_everything"),
    ("warm-up inside the momentum", "torch._foreach_lerp_(self.momentum, grads, 1 - self.beta1)",
     "torch._foreach_lerp_(self.momentum, torch._foreach_mul(grads, (self.count / 4).clamp(max=1)), 1 - self.beta1)",
     OPTIMISER),
    ("beta2 of the paper", "beta2=0.999", "beta2=0.99", OPTIMISER),
    ("no floor in the clipping", "param_norm.clamp(min=1e-3)", "param_norm.clamp(min=1e-12)",
     "test_math:test_optimiser_ignores_the_scale_of_gradients_and_caps_large_ones"),
    ("epsilon of Adam", "eps=1e-20", "eps=1e-8",
     "test_math:test_optimiser_ignores_the_scale_of_gradients_and_caps_large_ones"),
    ("slow critic is the fast one", "agent.args.slow_rate)", "1 - agent.args.slow_rate)",
     "test_golden_dreamer_v3:test_slow_critic"),
    ("a value is read on the host", '"grad/norm": grad_norm.norm()',
     '"grad/norm": grad_norm.norm() + 0 * grad_norm.norm().item()', "test_dispatch:test_no_host_reads"),
    # environment and loop
    ("truncation is a death", "is_last=over, is_terminal=terminated)", "is_last=over, is_terminal=over)", ROWS),
    ("an action after the end", 'state["action"] *= torch', 'state["action"] *= 1 | torch', ROWS),
    ("resetting rows are steps", 'int((~row["is_first"]).sum())', "num_envs", "test_index:test_steps_are_decisions"),
])


def mutate(name, old, new):
    """The script with one text replaced, as a module of its own."""
    source = (ROOT / f"{name}.py").read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {name}.py"
    spec = importlib.util.spec_from_file_location(f"mutated_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    exec(compile(source.replace(old, new), spec.origin, "exec"), vars(module))
    return module


def check(module, where, arguments, folder):
    """Call the test function `file:name` on a module, which it takes as `m` or `v3`, as a global `v3`, or by a run."""
    file, name = where.split(":")
    tests, quiet = importlib.import_module(file), io.StringIO()
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(quiet), redirect_stderr(quiet):
        for user in (tiny, tests):
            patch.setattr(user, "load", lambda _: module, raising=False)
        if inspect.ismodule(getattr(tests, "v3", None)):
            patch.setattr(tests, "v3", module)
        function, values = getattr(tests, name), dict(arguments, m=module, v3=module, monkeypatch=patch)
        wanted = inspect.signature(function).parameters
        if "played" in wanted:
            values["played"] = test_index.play(folder, *test_index.CASES[2])
        function(**{k: values[k] for k in wanted})


@functools.cache
def whole_script_passes(name, where, arguments):
    with tempfile.TemporaryDirectory() as folder:
        check(load(name), where, dict(arguments), Path(folder))


@pytest.mark.parametrize("name, what, old, new, where, arguments", [
    pytest.param(name, what, old, new, where, *arguments or [{}], id=f"{name}-{what.replace(' ', '_')}")
    for name, entries in MUTATIONS.items() for what, old, new, where, *arguments in entries])
def test_breakage_is_noticed(name, what, old, new, where, arguments, tmp_path):
    whole_script_passes(name, where, tuple(arguments.items()))
    with pytest.raises(AssertionError):
        check(mutate(name, old, new), where, arguments, tmp_path)
