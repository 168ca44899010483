"""Small breakages of the scripts, each of which must make the named check of another test file fail.

An entry: what breaks, a text that occurs exactly once in the script, what replaces it, the check, its arguments. If a
change of the script makes a text disappear, find the new one; the breakage stays the same."""
import functools
import importlib
import importlib.util
import inspect
import io
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_index
import test_resume
import torch
from conftest import ROOT, TESTS, load

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
FORGETS = "test_replay:test_online_queue_forgets_what_the_ring_lost"
KILLED_ROWS, DAMAGED = "test_replay:test_resume_after_a_kill", "test_bad_input:test_damaged_run"
SAVED = "test_resume:test_checkpoints_are_plain_data"
FRESH, THROUGH = dict(envs=2, saves=False), "test_replay:test_rows_go_to_the_files_too"
COUNTED, RATIO = "test_env:test_termination_is_not_truncation", "test_golden_dreamer_v3:test_ratio"
HISTORY, DRAWS = "test_dispatch:test_no_host_reads", "test_distributed:test_random_numbers_of_ranks"
ENCODER, CONTINUE = "test_golden_dreamer_v3:test_encoder", "test_golden_dreamer_v3:test_continue"
ROWS = "test_index:test_rows_in_replay"
STARTS, LIKELY = "test_replay:test_starts_in_an_episode", "test_replay:test_episodes_are_equally_likely"
RING, KILLED = "test_replay:test_ring_of_episodes", "test_replay:test_episodes_after_a_kill"
GRAY, RENDERED = "test_env:test_atari_frames_and_rewards", "test_env:test_dicts_and_vectors_are_rendered"
WHEN, WAITS = "test_smoke:test_when_it_learns_and_acts", "test_smoke:test_learning_waits_for_a_whole_episode"
ACTS, RESUMED = "test_index:test_acting_is_observing", "test_resume:test_k_plus_k_steps_are_2k"
REFUSED = "test_bad_input:test_flags"
MIXED, DISCRETE, AGAIN = dict(capacity=24, lengths=[[7, 9], [6]]), dict(discrete=True), dict(how="SIGTERM", k=14)

# of dreamer_v2's own mathematics
G, D = "test_golden_dreamer_v2:", "test_dreamer_v2:"
KL2 = D + "test_kl_balancing_gives_the_prior_its_share"
FREE = D + "test_free_nats_stop_both_sides_by_the_mean_of_the_batch"
RETURN2, SCHEDULE = D + "test_lambda_return_equals_its_definition", D + "test_schedule"
CUT, CUT_GRADIENT = D + "test_truncated_normal_is_a_distribution", D + "test_gradient_of_a_truncated_normal_sample"
REWARDS, DREAM2 = D + "test_which_reward_matters", D + "test_losses_of_a_dream_from_scratch"
RHO, REACH2 = D + "test_rho_is_the_share_of_reinforce", D + "test_reach"
DYNAMICS = D + "test_dynamics_gradient_passes_the_model_but_no_critic_and_no_past"
OWN = D + "test_each_optimizer_moves_its_own_parameters"
SLOW = D + "test_slow_critic_is_copied_after_updates_1_and_101"
CELL, SCAN2 = D + "test_cell_has_the_epsilon_of_keras", D + "test_hoisted_observe_equals_the_plain_scan"
DISCOUNT, WORLD2 = D + "test_discount_head_learns_gamma_of_what_goes_on", G + "test_world_model"
ADAM, ACTING2 = D + "test_optimiser_equals_its_scalar_form", D + "test_acting_is_observing"
GREEDY = D + "test_evaluation_takes_the_mode_of_the_policy_and_samples_the_latent"
REINFORCE, DYN = dict(discrete=True, grad="reinforce"), dict(discrete=False, grad="dynamics")
ATARI = dict(domain="atari")

# of iris's own
S, N = "test_iris:", "test_golden_iris:"
LONGER, PIECES, EARLY, LATE = dict(horizon=7), dict(chunks=[3, 200, 137]), dict(number=8), dict(number=38)
NEAREST, VQ, TOKENIZER = S + "test_nearest_code", N + "test_vector_quantisation", (
    S + "test_stop_gradients_of_the_tokenizer")
PERCEPTUAL, LAYERS, FEATURES = S + "test_perceptual_term", N + "test_tokenizer", N + "test_lpips"
LABELS, POSITIONS, TINY_WORLD = S + "test_labels_per_segment", S + "test_positions_that_predict", N + "test_tiny_world"
CACHE, DROPS = S + "test_cache_equals_full_attention", S + "test_everything_that_drops"
LITERAL, BURN_IN, BEGUN = S + "test_dream_equals_the_literal_one", S + "test_burn_in", (
    S + "test_memory_at_the_start_of_a_dream")
RETURN3, LOSSES = S + "test_lambda_return_against_its_definition", S + "test_behaviour_losses"
POLICY, STARTED = N + "test_actor_critic_losses", S + "test_dreams_begin_at_the_last_frame"
SEGMENTS, EVENLY, CUTS = S + "test_segments_by_brute_force", S + "test_uniform_over_episodes", (
    S + "test_ring_cuts_episodes")
NEW_ROWS = S + "test_new_rows_are_sampled"
OWN3, DECAY, AVERAGED = S + "test_each_part_trains_itself_only", N + "test_optimizer_groups", (
    S + "test_gradients_are_averaged_then_clipped")
SOFTER, WARM = S + "test_temperature_and_exploration", S + "test_memory_of_the_running_episode"
EPOCHS, EACH_EPOCH, REPEATED = S + "test_schedule", S + "test_tokens_are_made_anew_in_each_epoch", (
    S + "test_action_repeat")
GAMES, LIVES, IDLE = S + "test_lives", S + "test_a_lost_life_begins_a_new_episode", (
    S + "test_nothing_is_decided_after_an_end")
FINISHED, STOPPED, MIDWAY = S + "test_finished_run_resumed", S + "test_stopped_within_an_epoch", (
    S + "test_stopped_while_collecting")

MUTATIONS = dict(iris=[
    # pure functions
    ("draws from the inverse probabilities", ".softmax(-1) / noise)", ".softmax(-1) * noise)", S + "test_sampler"),
    ("the farthest word", "@ codebook.T).argmin(-1)", "@ codebook.T).argmax(-1)", NEAREST),
    ("words of any length", "(codebook.square().sum(-1) - 2 * z @", "(-2 * z @", NEAREST),
    ("distances in bf16", "with torch.autocast(z.device.type, enabled=False):", "if True:",
     S + "test_nearest_code_under_autocast"),
    ("bootstrap one step early", "live * (1 - lam) * value[1:]", "live * (1 - lam) * value[:-1]", RETURN3),
    ("lambda exchanged", "live * (1 - lam) * value[1:], live * lam", "live * lam * value[1:], live * (1 - lam)",
     RETURN3),
    ("no value of the last frame", "ret, rets = value[-1], []", "ret, rets = 0 * value[-1], []", RETURN3),
    ("an end cuts nothing", "gamma * (1 - end.to(value.dtype))", "gamma * (1 - 0 * end.to(value.dtype))", RETURN3),
    ("time flipped in the return", "torch.stack(rets[::-1])", "torch.stack(rets)", RETURN3),
    ("padding counts", "(x * mask).sum() / gather", "x.sum() / gather", LABELS),
    ("each rank's own mean", "gather_ranks(mask.sum(dtype=x.dtype)[None]).mean()", "mask.sum(dtype=x.dtype)",
     S + "test_losses_of_the_joint_batch"),
    # environment
    ("another resize", "args.image_size, life_loss_info",
     "args.image_size, img_height=64, img_width=64, life_loss_info", GRAY, dict(gray=False)),
    ("no sticky actions", "=args.sticky_actions", "=0.0", "test_env:test_atari_sticky_actions"),
    ("lost lives are no ends", "life_loss_info=args.life_loss)", "life_loss_info=False)", GAMES),
    ("lost lives end an evaluation", "replace(args, life_loss=False)", "args", GAMES),
    ("vectors are not rendered", "if pixels is None:", "if False:", RENDERED),
    ("images are rendered too", "pixels = len(", "pixels = True or len(",
     "test_env:test_image_observations_are_taken_as_they_are"),
    ("one environment step per policy step", "RepeatAction(env, args.action_repeat)", "RepeatAction(env, 1)",
     REPEATED),
    # replay
    ("a time limit is no end", 'x["is_last"]) for x in (row, outcome)',
     'x) for x in (row["is_last"], outcome.get("is_terminal", outcome["is_last"]))', NEW_ROWS),
    ("new rows are never sampled", "~end\n        self.table = self.tokens =", "~end\n        self.tokens =", NEW_ROWS),
    ("new frames without tokens", "~end\n        self.table = self.tokens =", "~end\n        self.table =",
     S + "test_tokens_in_replay"),
    ("frames after an end are stored", "self.rows + 1) * ~none", "self.rows + 1)", SEGMENTS),
    ("episodes without end", "self.begun = begun * ~end", "self.begun = begun", EVENLY),
    ("overwritten rows stay", "(begun - 1).clamp(min=oldest)", "begun - 1", CUTS),
    ("a cut episode is as long as before", "(self.begun - 1).clamp(min=self.rows - self.size)", "(self.begun - 1)",
     S + "test_endless_episode_in_a_ring"),
    ("episodes of the first environment only", "% self.capacity * self.num_envs + env\n        made",
     "% self.capacity * self.num_envs\n        made", SEGMENTS),
    ("padding repeats a frame", "{k: v * mask.view(*mask.shape, *[1] * (v.dim() - 2)) for k, v", "{k: v for k, v",
     SEGMENTS),
    ("padding at the other end", "(length - 1 if last else 0)", "(0 if last else length - 1)", SEGMENTS),
    ("uniform over steps", "(episode * len(self.table)).long()",
     "torch.multinomial(self.table[:, 1].double(), batch_size, True)", EVENLY),
    ("the newest episode is never sampled", "(episode * len(self.table))", "(episode * (len(self.table) - 1))", EVENLY),
    ("the last step is never sampled", "(place * frames)", "(place * (frames - 1))", EVENLY),
    ("the first frames of the running episode", "env, frames - length, length", "env, 0 * frames, length", CUTS),
    ("decoded frames outlive the tokenizer", "replay.tokens = replay.recon = None", "replay.tokens = None", EACH_EPOCH),
    ("decoded frames outlive their replay", "~end\n        self.table = self.tokens = self.recon",
     "~end\n        self.table = self.tokens", S + "test_tokens_in_replay"),
    ("replay is encoded in float32", "with autocast(self.args, device):\n            return self.tokenizer.encode",
     "if True:\n            return self.tokenizer.encode", S + "test_precision_of_frames_in_replay"),
    ("replay is decoded in float32", "with autocast(self.args, device):\n            return self.tokenizer.decode",
     "if True:\n            return self.tokenizer.decode", S + "test_precision_of_frames_in_replay"),
    # networks
    ("symmetric padding", "nn.ZeroPad2d((0, 1, 0, 1))", "nn.ZeroPad2d((1, 1, 1, 1))",
     S + "test_downsampling_pads_right_and_bottom"),
    ("epsilon of a library", "channels, eps=1e-6)", "channels)", LAYERS),
    ("attention at other levels", "if level in (2, 3)", "if level in (1, 2)", LAYERS),
    ("residual block without its input", "return x + super().forward(x)", "return super().forward(x)", LAYERS),
    ("decoder of the encoder's depth", "stage(channels, level, blocks + 1)", "stage(channels, level, blocks)",
     S + "test_parameter_counts", dict(actions=6, world=8_448_005, behaviour=3_218_983)),
    ("LPIPS of raw images", "(x - self.shift) / self.scale", "x", FEATURES),
    ("LPIPS of raw features", "(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))", "a, b",
     FEATURES),
    ("LPIPS summed over places", ".mean((1, 2, 3))", ".sum((1, 2, 3))", FEATURES),
    ("LPIPS drops nothing", "LPIPS(0.5 if args.lpips_dropout else 0.0)", "LPIPS(0.0)",
     S + "test_dropout_of_lpips_is_a_flag"),
    ("LPIPS learns", "self.requires_grad_(False)", "", OWN3),
    ("squares of images in [-1,1]", "square().flatten(1) / 4", "square().flatten(1)", S + "test_perceptual_losses"),
    # tokenizer
    ("words as a library starts them",
     "nn.init.uniform_(self.codebook.weight, -1 / args.vocab_size, 1 / args.vocab_size)", "pass",
     S + "test_initial_weights"),
    ("tokens column by column", "mT.unflatten(-1, (side, side))", "mT.unflatten(-1, (side, side)).mT", VQ),
    ("frames beyond [0,1]", "+ 1) / 2).clamp(0, 1)", "+ 1) / 2)", S + "test_decoded_frames_are_clamped"),
    ("the codebook loss moves the encoder", "codebook=(z.detach() - z_q)", "codebook=(z - z_q)", TOKENIZER),
    ("the commitment moves the words", "commit=(z - z_q.detach())", "commit=(z - z_q)", TOKENIZER),
    ("no straight-through gradient", "reconstruct(z + (z_q - z).detach())", "reconstruct(z_q)", TOKENIZER),
    ("commitment of the paper on VQ-VAE", "commit=(z - z_q.detach())", "commit=0.5 * (z - z_q.detach())", VQ),
    ("square error of images", "image=(recon - target).abs()", "image=(recon - target).square()", VQ),
    ("images in [0,1] as target", "2 * frames - 1\n        losses", "frames\n        losses", PERCEPTUAL),
    ("perceptual loss summed over images", "perceptual(recon, target).mean()", "perceptual(recon, target).sum()",
     PERCEPTUAL),
    # world model
    ("every output sees everything", "causal = mask is None and x.shape[1] > 1", "causal = False",
     S + "test_causality"),
    ("causal mask of the first keys", "if start and count > 1:", "if False:", CACHE, PIECES),
    ("a frame's last token sees the action", ".tril(start)", "", CACHE, PIECES),
    ("positions begin anew", "self.position.weight[start : start + count]", "self.position.weight[:count]", CACHE,
     PIECES),
    ("dreams drop", "start: int = 0, cache=None, dropout: float = 0.0)", "start: int = 0, cache=None, dropout=0.1)",
     S + "test_dropout_in_training_only"),
    ("attention drops nothing", "q, k, v, mask, dropout, causal)", "q, k, v, mask, 0.0, causal)", DROPS),
    ("the world model drops nothing", "mask, args.dropout)", "mask, 0.0)", DROPS),
    ("weights as a library starts them", "nn.init.normal_(module.weight, 0.0, 0.02)", "pass",
     S + "test_initial_weights"),
    ("the last token predicts, not the action", "[*range(tokens - 1), tokens]", "[*range(tokens)]", POSITIONS),
    ("reward and end before the action", "at_action = y[:, :, -1]", "at_action = y[:, :, -2]", POSITIONS),
    ("labels not shifted", "tokens.flatten(1)[:, 1:]", "tokens.flatten(1)[:, :-1]", TINY_WORLD),
    ("mask not shifted", "repeat_interleave(self.tokens, 1)[:, 1:]", "repeat_interleave(self.tokens, 1)[:, :-1]",
     LABELS),
    ("ends of padding", "[:, 1:], mask, mask", "[:, 1:], mask, mask | True", LABELS),
    ("rewards rounded", "reward.sign() + 1", "reward.clamp(-1, 1) + 1",
     S + "test_rewards_are_classes_of_their_sign"),
    ("rewards upside down", "(reward.sign() + 1)", "(1 - reward.sign())", TINY_WORLD),
    ("tokens that stay are those that change", "tokens[:, 1:] != tokens", "tokens[:, 1:] == tokens",
     S + "test_where_the_losses_come_from"),
    ("a reward of NaN is none", "errors[1] + 0 * reward", "errors[1]", S + "test_reward_of_nan_is_seen"),
    # dreams
    ("memory is cut early", "+ 1 + world.tokens > world", "+ 1 + 2 * world.tokens > world",
     S + "test_number_of_passes"),
    ("memory is cut down to one token", "self.written, self.waiting = 0, self.tokens",
     "self.written, self.waiting = 0, self.waiting", LITERAL, LONGER),
    ("the last token is never read", "torch.cat(tokens, 1), tokens[-1]", "torch.cat(tokens, 1), tokens[-1][:, :0]",
     LITERAL, LONGER),
    ("the likeliest reward", 'sample(world.reward_head(y), noise["reward"])', "world.reward_head(y).argmax(-1)",
     LITERAL, LONGER),
    ("the likeliest end", 'sample(world.end_head(y), noise["end"])', "world.end_head(y).argmax(-1)", LITERAL, LONGER),
    ("rewards of 0 to 2", 'noise["reward"]) - 1,', 'noise["reward"]),', LITERAL, LONGER),
    ("burn-in of padding", "self(recon[:-1], start, mask[:-1])", "self(recon[:-1], start)", BEGUN),
    ("the first frame is seen twice", "self(recon[:-1], start, mask[:-1])", "self(recon, start, mask)", BEGUN),
    ("the dream begins a frame early", "tokens.device), recon[-1]\n", "tokens.device), recon[-2]\n", LITERAL, LONGER),
    ("gradient through the dream's start", "@torch.no_grad()  # REINFORCE", "# REINFORCE", BURN_IN),
    ("memory of padding", "tuple(s * mask[t, :, None] for s in state)", "state", BURN_IN),
    ("the policy forgets its burn-in", '(dream["hidden"], dream["cell"])', '(0 * dream["hidden"], 0 * dream["cell"])',
     S + "test_policy_is_evaluated_as_it_dreamt"),
    # behaviour
    ("the actor trains its baseline", "ret - value[:-1].detach()", "ret - value[:-1]", LOSSES),
    ("gradient through the return", "value.detach(), end, self.args.gamma", "value, end, self.args.gamma", LOSSES),
    ("action of the next frame", "action[:-1, :, None]", "action[1:, :, None]", POLICY),
    ("sign of the actor loss", "policy=-(taken", "policy=(taken", POLICY),
    ("sign of the entropy", "entropy=-self.args", "entropy=self.args", POLICY),
    ("half of the square", "value=(value[:-1] - ret).square()", "value=0.5 * (value[:-1] - ret).square()", POLICY),
    ("the policy sees [0,1]", "(2 * frames.flatten(0, 1) - 1)", "frames.flatten(0, 1)", N + "test_actor_critic"),
    # update
    ("embeddings decay", "if isinstance(m, nn.Linear)}", "if isinstance(m, (nn.Linear, nn.Embedding))}", DECAY),
    ("biases decay", "dict(params=kept, weight_decay=0.0)", "dict(params=kept)", DECAY),
    ("the tokenizer decays", "tokenizer=torch.optim.Adam(", "tokenizer=torch.optim.AdamW(",
     S + "test_only_the_transformer_decays"),
    ("optimiser of another part", "optimizer = self.parts[part]", 'optimizer = self.parts["world"]', OWN3),
    ("gradients pile up", "        optimizer.zero_grad()\n", "", OWN3),
    ("gradients of one rank", "        average_ranks([p.grad for p in params])\n", "", AVERAGED),
    ("no clipping", "clip_grad_norm_(params, self.clip)", "clip_grad_norm_(params, 1e9)", AVERAGED),
    ("dreams begin at the first frame", 'tokens=batch["tokens"][-1]', 'tokens=batch["tokens"][0]', STARTED),
    ("dreams begin in the padding", '"recon tokens", True)', '"recon tokens", False)', STARTED),
    ("burn-in of one frame less", "args.burn_in + 1, ", "args.burn_in, ", STARTED),
    ("a value is read on the host", "norm = optimizers.step(part, sum(losses.values()))",
     "norm = optimizers.step(part, sum(losses.values()))\n    norm.item()", S + "test_no_host_reads",
     dict(part="world")),
    # acting
    ("the policy sees raw frames", "self.decode(self.encode(image))", "to_frames(image)", WARM),
    ("memory crosses the border of episodes", "state[k] * ~first[:, None]", "state[k]", WARM),
    ("temperature of collecting in evaluation", "args.temperature if self.training else args.eval_temperature",
     "args.temperature", SOFTER),
    ("temperature of evaluation while collecting", "args.temperature if self.training else args.eval_temperature",
     "args.eval_temperature", SOFTER),
    ("random actions in evaluation", "if self.training:  # one", "if True:  # one", SOFTER),
    ("no random actions", "device=device) < args.epsilon", "device=device) < 0", SOFTER),
    ("padding before the running episode is seen", "tuple(state.values()), mask.to(device))",
     "tuple(state.values()))", WARM),
    # evaluate and dream
    ("the video's actions come late", "action[context - 1 : -1]", "action[context:]",
     S + "test_actions_of_the_open_loop_video"),
    # loop
    ("memory begins anew in each epoch", "agent.warm_up(replay, device) if", "agent.initial(num_envs, device) if",
     S + "test_memory_at_the_start_of_an_epoch"),
    ("an action after the end", 'torch.as_tensor(~row["is_last"], device=device)[:, None]).cpu()', "1).cpu()", IDLE),
    ("resetting rows are steps", 'torch.tensor([(~row["is_last"]).sum()', "torch.tensor([num_envs", IDLE),
    ("rows that decide nothing are stored", 'if not row["is_last"].all():', "if True:", LIVES),
    ("memory goes on after a lost life", 'dict(outcome, is_first=row["is_last"])', "outcome", LIVES),
    ("returns of lives", "zip(envs.ret[envs.over], envs.length[envs.over])",
     'zip(envs.ret[outcome["is_last"]], envs.length[outcome["is_last"]])', LIVES),
    ("an epoch goes beyond the last step", "min(step + args.epoch_steps, args.total_timesteps)",
     "step + args.epoch_steps", REPEATED),
    ("frames are policy steps", "step * args.action_repeat", "step", REPEATED),
    ("learning begins an epoch early", "if step > (args", "if step >= (args", EPOCHS),
    ("the world model last", '("tokenizer", "world", "behaviour")', '("tokenizer", "behaviour", "world")', EACH_EPOCH),
    ("no epochs that only train", "or extra < args.extra_epochs or", "or", EPOCHS),
    ("steps stand still in the last epochs", "step + extra * args.epoch_steps", "step", EPOCHS),
    ("tokens of the old tokenizer", "replay.tokens = replay.recon = None  #", "replay.recon = None  #", EACH_EPOCH),
    ("looking draws the run's random numbers", "torch.random.fork_rng([device] if cuda else [])", "torch.no_grad()",
     "test_resume:test_looking_changes_nothing"),
    ("other weights in each process", "torch.manual_seed(args.seed)  #", "torch.manual_seed(args.seed + rank)  #",
     "test_distributed:test_ranks_begin_equal_in_different_environments"),
    ("each process plays the same episodes", "args.seed + rank * num_envs + step)", "args.seed + rank + step)",
     "test_distributed:test_ranks_begin_equal_in_different_environments"),
    # resume
    ("a new optimiser", '        optimizers.load_state_dict(saved["optimizer"])\n', "", MIDWAY),
    ("new weights", 'agent.load_state_dict(saved["agent"])', "pass", MIDWAY),
    ("an empty replay", '        replay.load_state_dict(saved["replay"])\n', "", MIDWAY),
    ("episodes are forgotten on resume", "self.size = int(", "self.size = 0 * int(", MIDWAY),
    ("rows of a killed life are frames", "self.size = int(", "self.size = len(newest) + 0 * int(",
     S + "test_rows_tell_the_episodes"),
    ("the last epochs are not made again", "extra = extra if step >= args.total_timesteps else 0", "extra = extra",
     S + "test_finished_run_collects_more"),
    ("curves of the last epochs are cut", "purge_step=now() + 1", "purge_step=step + 1",
     S + "test_curves_of_the_last_epochs"),
    ("other random numbers", 'torch.set_rng_state(saved["rng"][0])', "pass", MIDWAY),
    ("updates count anew", '("step", "updates", "extra"', '("step", "extra", "extra"', MIDWAY),
    ("the epoch begins again", '"begun", "goal", "done")', '"begun", "goal", "goal")', STOPPED, EARLY),
    ("an epoch's first step is forgotten", '"begun", "goal", "done")', '"extra", "goal", "done")', STOPPED, LATE),
    ("an epoch's goal is forgotten", '"begun", "goal", "done")', '"begun", "extra", "done")', MIDWAY),
    ("the last epochs again", "extra = extra if step >= args.total_timesteps else 0", "extra = 0", FINISHED),
    ("old metrics are forgotten", 'for k, v in saved["metrics"].items()}', "for k, v in ()}", STOPPED, LATE),
    ("the same episodes again", "rank * num_envs + step)", "rank * num_envs)",
     "test_resume:test_resumed_episodes_are_new"),
    ("nothing is due at the end", " or not goes_on()\n", "\n", SAVED),
    ("infinite weights are saved", "and not math.isfinite(value)", "and False",
     "test_bad_input:test_nan_weights_are_not_saved"),
], dreamer_v2=[
    # pure functions
    ("alpha and 1 - alpha exchanged", "(1 - balance) * rep_loss + balance * dyn_loss",
     "balance * rep_loss + (1 - balance) * dyn_loss", KL2, dict(share=0.8)),
    ("prior's half trains the posterior", "categorical_kl(post.detach(), prior)", "categorical_kl(post, prior)", KL2,
     dict(share=0.8)),
    ("posterior's half trains the prior", "categorical_kl(post, prior.detach())", "categorical_kl(post, prior)", KL2,
     dict(share=0.8)),
    ("KL turned round", "kl = categorical_kl(post, prior)\n", "kl = categorical_kl(prior, post)\n", KL2,
     dict(share=0.8)),
    ("free nats per state", "torch.where(trained, kl.mean(), free_nats)", "kl.clamp(min=free_nats).mean()", FREE),
    ("no free nats", "torch.where(trained, kl.mean(), free_nats)", "kl.mean()", FREE),
    ("time flipped in the return", "torch.stack(rets[:0:-1])", "torch.stack(rets[1:])", RETURN2),
    ("reward of the state that is entered", "[value[-1]], reward[:-1] +", "[value[-1]], reward[1:] +", RETURN2),
    ("discount of the state that is entered", "(discount[:-1] * lam).flip", "(discount[1:] * lam).flip", RETURN2),
    ("bootstrap one step early", "(1 - lam) * value[1:]", "(1 - lam) * value[:-1]", RETURN2),
    ("last reward counted twice, as printed", "rets, step = [value[-1]],",
     "rets, step = [reward[-1] + discount[-1] * value[-1]],", D + "test_the_last_state_lends_only_its_value"),
    ("schedule goes on", "mix = min(step / steps, 1)", "mix = step / steps", SCHEDULE),
    ("half-life as an e-fold", "0.5 ** (step / steps)", "math.exp(-step / steps)", SCHEDULE),
    ("sample not exactly one-hot", "keepdim=True), 1.0)", "keepdim=True), 0.9999999)",
     D + "test_straight_through_sample"),
    ("no straight-through gradient", "return grad, None", "return 0 * grad, None",
     D + "test_straight_through_sample"),
    ("exact truncated gradient by default", "unit if self.exact_grad else unit.detach()",
     "unit.detach() if self.exact_grad else unit", CUT_GRADIENT),
    ("the clip stops the gradient", "return x + (x.clamp(-1 + 1e-6, 1 - 1e-6) - x).detach()",
     "return x.clamp(-1 + 1e-6, 1 - 1e-6)", CUT_GRADIENT),
    ("no clip", "return x + (x.clamp(-1 + 1e-6, 1 - 1e-6) - x).detach()", "return x",
     D + "test_truncated_normal_samples_by_inverse_cdf"),
    ("density not normalised", "- self.std.log() - self.mass.log()).sum(-1)", "- self.std.log()).sum(-1)", CUT),
    ("entropy of the uncut normal", "+ (low - high) / (2 * self.mass)).sum(-1)", ").sum(-1)", CUT),
    ("softplus deviation", "2 * (std / 2).sigmoid() + 0.1", "F.softplus(std) + 0.1", CUT),
    ("mode is the least likely", "noise if self.training else torch.ones_like(noise)",
     "noise if self.training else policy.exp() ** 2",
     GREEDY, DISCRETE),
    # networks
    ("epsilon of a library", "nn.LayerNorm(3 * deter, eps=1e-3)", "nn.LayerNorm(3 * deter, eps=1e-5)", CELL,
     dict(scale=0.01)),
    ("update gate opened", "(update - 1).sigmoid()", "(update + 1).sigmoid()",
     D + "test_cell_starts_by_keeping_its_memory"),
    ("update gate inverted", "torch.lerp(deter, cand,", "torch.lerp(cand, deter,", CELL, dict(scale=1.0)),
    ("order of the gates", "reset, cand, update = self.gru_norm", "update, cand, reset = self.gru_norm", CELL,
     dict(scale=1.0)),
    ("reset without effect", "torch.tanh(reset.sigmoid() * cand)", "torch.tanh(cand)", CELL, dict(scale=1.0)),
    ("the action crosses a reset", "prev_action.to(dtype) * keep", "prev_action.to(dtype)", SCAN2),
    ("the latent crosses a reset", "deter * k, stoch * k, *rows)", "deter * k, stoch, *rows)", SCAN2),
    ("decoder activates its first layer", "weight.shape[1:]) + first.bias.to(x.dtype)",
     "weight.shape[1:]).add(first.bias.to(x.dtype)).relu()", WORLD2, ATARI),
    ("tokens channel by channel", "return x.permute(0, 2, 3, 1).flatten(1)",
     "return x.flatten(1)", WORLD2, ATARI),
    ("a dense layer of many rows without bias", "weight[..., None, None], bias)", "weight[..., None, None])",
     "test_math:test_dense_layer_of_many_rows",
     dict(rows=512, slow_mkl=True, by_convolution=True, bias=torch.ones(5, dtype=torch.float64))),
    ("weights as a library starts them",
     "    nn.init.xavier_uniform_(layer.weight)\n", "", D + "test_initialisation_is_that_of_keras"),
    # world model
    ("gamma missing in the discount target", 'target = (1 - rows["is_terminal"].to(reward.dtype)) * self.args.gamma',
     'target = 1 - rows["is_terminal"].to(reward.dtype)', DISCOUNT),
    ("a time limit is a death", 'target = (1 - rows["is_terminal"]', 'target = (1 - rows["is_last"]', DISCOUNT),
    ("gamma twice", "[..., 0].sigmoid()\n\n    def loss", "[..., 0].sigmoid() * self.args.gamma\n\n    def loss",
     DISCOUNT),
    ("rewards not squashed", 'rows["reward"].tanh() if', 'rows["reward"] if', WORLD2, ATARI),
    ("mean over pixels", "pixels).flatten(2).sum(-1)", "pixels).flatten(2).mean(-1)", WORLD2, ATARI),
    ("KL not scaled", "scales = dict(kl=self.args.kl_scale, discount", "scales = dict(discount", WORLD2,
     ATARI),
    ("reward head does not train the latents", "normal_nll(self.reward(feat)[",
     "normal_nll(self.reward(feat.detach())[", REACH2, dict(loss="reward", discrete=True)),
    # behaviour
    ("estimators exchanged", 'auto = "reinforce" if discrete else "dynamics"',
     'auto = "dynamics" if discrete else "reinforce"', D + "test_gradient_estimator_by_default"),
    ("the policy bends the states it sees", "self.sample(feats[-1].detach(), ", "self.sample(feats[-1], ",
     D + "test_a_dream_is_made_of_prior_steps", dict(discrete=False)),
    ("a dream goes on beyond the end", "torch.cat([known[None], discount[1:]])", "discount",
     D + "test_discount_of_the_replayed_state_is_known"),
    ("w_0 = d_0", "torch.cat([torch.ones_like(discount[:1]), discount[:-1]]).cumprod(0)", "discount.cumprod(0)",
     D + "test_a_dream_from_a_terminal_state_teaches_only_its_first_state"),
    ("gradient through the weights", "discount[:-1]]).cumprod(0).detach()", "discount[:-1]]).cumprod(0)", RHO,
     DISCRETE),
    ("V_t instead of V_t+1 in the advantage", "advantage = (target[1:] -", "advantage = (target[:-1] -", REWARDS,
     REINFORCE),
    ("V_t instead of V_t+1 in the dynamics", "(1 - rho) * target[1:]", "(1 - rho) * target[:-1]", REWARDS, DYN),
    ("baseline of the next state", "slow_value[:-2]).detach()", "slow_value[1:-1]).detach()", DREAM2, REINFORCE),
    ("gradient through the advantage", "(target[1:] - slow_value[:-2]).detach()", "(target[1:] - slow_value[:-2])", RHO,
     DISCRETE),
    ("action of the next state", "action[:-1].detach()  # whether", "action[1:].detach()  # whether",
     DREAM2, REINFORCE),
    ("gradient through the action in its log-probability", "action[:-1].detach()  # whether",
     "action[:-1]  # whether", RHO, dict(discrete=False)),
    ("rho inverted", "both=coefs[1])", "both=1 - coefs[1])", RHO, DISCRETE),
    ("sign of the actor loss", "policy=-(weight", "policy=(weight", DREAM2, DYN),
    ("sign of the entropy", "+ coefs[0] * bonus)", "- coefs[0] * bonus)", DREAM2, REINFORCE),
    ("critic bootstraps from itself", "(world.reward, self.slow_critic))", "(world.reward, self.critic))", DREAM2,
     REINFORCE),
    ("critic not weighted", "value=(weight[:-1] * normal_nll", "value=(normal_nll", DREAM2, DYN),
    ("the critic bends the dream", "self.critic(feat[:-1].detach())", "self.critic(feat[:-1])", DYNAMICS),
    ("the critic bends its target", "normal_nll(value, target.detach())", "normal_nll(value, target)", DYNAMICS),
    ("slow critic wants gradients", "1).requires_grad_(False)", "1)", DYNAMICS),
    ("start states keep their graph", "deter=deter.detach(), stoch=stoch.detach())", "deter=deter, stoch=stoch)",
     DYNAMICS),
    ("slow critic begins as a copy", 'self.register_buffer("updates"',
     'self.slow_critic.load_state_dict(self.critic.state_dict())\n        self.register_buffer("updates"', SLOW),
    ("slow critic first copied late", "self.updates % self.args.slow_every == 0",
     "(self.updates + 1) % self.args.slow_every == 0", SLOW),
    ("first copy only in part", "self.updates == 0, 1.0, self", "self.updates < 0, 1.0, self",
     D + "test_slow_critic_moves_by_its_rate_after_a_first_full_copy"),
    # update
    ("epsilon of torch", "torch._foreach_sqrt(self.square), self.eps)",
     "torch._foreach_sqrt(self.square), self.eps * correct2.sqrt())", G + "test_optimiser", dict(dtype=torch.float64)),
    ("decay scaled by the learning rate", "1 - self.decay)", "1 - self.lr * self.decay)",
     D + "test_weight_decay_ignores_the_learning_rate", dict(lr=1e-5)),
    ("clipping tensor by tensor", "grads = torch._foreach_mul(grads, (self.clip / norm).clamp(max=1))",
     "grads = [g * (self.clip / g.norm()).clamp(max=1) for g in grads]", ADAM),
    ("every gradient at the limit", "(self.clip / norm).clamp(max=1)", "self.clip / norm", ADAM),
    ("beta2 of another Adam", "beta2=0.999):", "beta2=0.99):", ADAM),
    ("learning rates exchanged", "(agent.behaviour.actor, args.actor_lr)", "(agent.behaviour.actor, args.critic_lr)",
     OWN, REINFORCE),
    ("slow critic copied before the step",
     'optimizer.parts["critic"].step(losses["value"])\n    agent.behaviour.update_slow_critic()',
     '(agent.behaviour.update_slow_critic(), optimizer.parts["critic"].step(losses["value"]))[1]',
     D + "test_slow_critic_follows_the_update_of_the_critic"),
    ("truncated starts are dead", '(1 - rows["is_terminal"].flatten()', '(1 - rows["is_last"].flatten()',
     D + "test_discount_of_the_replayed_state_is_known"),
    # acting, loop
    ("always greedy", "noise if self.training else torch.ones_like(noise)", "torch.ones_like(noise)",
     GREEDY, DISCRETE),
    ("never greedy", "noise if self.training else torch.ones_like(noise)", "noise",
     GREEDY, DISCRETE),
    ("an episode begins with old memory", 'state["action"][None], obs["is_first"],',
     'state["action"][None], obs["is_first"] & False,', ACTING2, DISCRETE),
    ("random actions in one half", ".uniform_(-1, 1)", ".uniform_(0, 1)", D + "test_random_actions_are_uniform"),
    ("coefficients exchanged", "for text in (args.ent_coef, args.rho)]", "for text in (args.rho, args.ent_coef)]",
     D + "test_updates_of_a_run"),
    ("no additional first updates", "if updates else 1 + args.pretrain", "if updates else 1",
     D + "test_updates_of_a_run"),
    # replay
    ("ends are not preferred", "(self.length if self.prioritize_ends else 0)", "0", STARTS, dict(rows=12, ends=True)),
    ("ends are always preferred", "(self.length if self.prioritize_ends else 0)", "self.length", STARTS,
     dict(rows=12, ends=False)),
    ("the last start never comes", "(last + 1 + (self", "(last + (self", STARTS, dict(rows=12, ends=False)),
    ("starts beyond the last one", ").long().minimum(last)", ").long()", STARTS, dict(rows=12, ends=True)),
    ("memory goes on at the start of a chunk", '        batch["is_first"][0] = True\n', "", STARTS,
     dict(rows=12, ends=True)),
    ("old episodes more often", "(episode * len(self.episodes))",
     "(episode.square() * len(self.episodes))", LIKELY, dict(ends=True)),
    ("rows of the first environment only", "env.expand_as(steps)", "0 * env.expand_as(steps)", LIKELY,
     dict(ends=True)),
    ("episodes of the first environment only", "(self.begun[env], rows, env)", "(self.begun[env], rows, 0)", RING,
     MIXED),
    ("an episode begins one row late", "[env] = number if", "[env] = number + 1 if", RING, MIXED),
    ("a row of the next episode", "rows = number - self.begun[env] + 1", "rows = number - self.begun[env] + 2", RING,
     MIXED),
    ("a sequence has to fit in its steps and one more", "rows = number - self.begun[env] + 1",
     "rows = number - self.begun[env]", "test_replay:test_short_episodes_are_dropped"),
    ("forgotten when the last row is overwritten", "self.episodes[0][0] < self.rows - self.size",
     "sum(self.episodes[0][:2]) <= self.rows - self.size", RING, MIXED),
    ("in the order of their ends", "self.episodes.sort()", "pass", RING, MIXED),
    ("an episode without its beginning is given", "self.begun = [-math.inf] * self.num_envs",
     "self.begun = [self.rows - self.size] * self.num_envs", KILLED, dict(rows=60, more=4)),
    ("episodes are forgotten on resume", "(first | last).any(-1).nonzero()", "(first & last).any(-1).nonzero()", KILLED,
     dict(rows=60, more=4)),
    # environment
    ("another resize", "img_height=64, img_width=64, ", "", GRAY, dict(gray=True)),
    ("always in colour", "grayscale=args.grayscale", "grayscale=False", GRAY, dict(gray=True)),
    ("no sticky actions", "=args.sticky_actions", "=0.0", "test_env:test_atari_sticky_actions"),
    ("one environment step per policy step", "RepeatAction(env, args.action_repeat)", "RepeatAction(env, 1)",
     "test_flags:test_every_kind_of_environment", dict(kind="action repeat")),
    ("vectors are not rendered", "if pixels is None:", "if False:", RENDERED),
    ("images beside vectors are not rendered", '"shape", None) or ()', '"shape", None) or (1, 1, 1)', RENDERED),
    ("images are rendered too", "pixels = len(", "pixels = True or len(",
     "test_env:test_image_observations_are_taken_as_they_are"),
    ("a camera that stays behind", 'camera_id=2 * ("quadruped" in args.env_id)', "camera_id=0",
     "test_env:test_control_is_rendered_small_by_the_official_camera", dict(task="quadruped-run", camera=2)),
    ("truncation is a death", "is_terminal=death)", "is_terminal=self.over)", ROWS),
    # loop
    ("rows keep the action chosen on them", '        action = state["action"].cpu().numpy()\n',
     '        action = state["action"].cpu().numpy()\n'
     '        replay.data["action"][(replay.rows - 1) % rows] = state["action"]\n', ROWS),
    ("an action crosses the border of episodes", 'state["action"] *= torch', 'state["action"] *= 1 | torch', ROWS),
    ("resetting rows are steps", 'torch.tensor([(~row["is_first"]).sum()', "torch.tensor([num_envs",
     "test_index:test_steps_are_decisions"),
    ("the policy acts from the start", "if step < args.learning_starts or not updates:", "if False:", WHEN),
    ("random actions for ever", "if step < args.learning_starts or not updates:", "if True:", WHEN),
    ("the policy acts before it has learned", "if step < args.learning_starts or not updates:",
     "if step < args.learning_starts:", WAITS),
    ("updates from the first episode on", "if ready == world_size and step >= args.learning_starts:",
     "if ready == world_size:", WHEN),
    ("no pretraining", "if updates else 1 + args.pretrain", "if updates else 1", WHEN),
    ("pretraining again and again", "* ratio) if updates else 1 + args.pretrain",
     "* ratio) + (1 - (not updates)) * args.pretrain if updates else 1 + args.pretrain", WHEN),
    ("updates per step instead of steps per update", "ratio = 1 / args.train_every", "ratio = args.train_every", WHEN),
    ("schedules stand still", "schedule(text, step) for text", "schedule(text, 0) for text", WHEN),
    ("a part of an update is lost", "learned + count / ratio if updates else step", "step", WAITS),
    ("random actions on one side", "device=device).uniform_(-1, 1)", "device=device).uniform_(0, 1)",
     "test_index:test_random_actions_are_uniform"),
    ("frames are policy steps", "step * args.action_repeat", "step", "test_flags:test_every_kind_of_environment",
     dict(kind="action repeat")),
    ("looking draws the run's random numbers", "torch.random.fork_rng([device] if cuda else [])", "torch.no_grad()",
     "test_resume:test_looking_changes_nothing"),
    ("waits for ever for long episodes", ">= 100 and not", ">= 1e9 and not",
     "test_bad_input:test_no_episode_fits", dict(flags=dict(batch_length=8))),
    ("dreams without an actor term", "min(args.imag_horizon, args", "min(args.imag_horizon + 1, args", REFUSED,
     dict(case="dreams too short for an actor term")),
    ("other weights in each process", "torch.manual_seed(args.seed)", "torch.manual_seed(args.seed + rank)",
     "test_distributed:test_ranks_begin_equal_in_different_environments"),
    ("each process plays the same episodes", "args.seed + rank * num_envs + step)", "args.seed + rank + step)",
     "test_distributed:test_ranks_begin_equal_in_different_environments"),
    # acting
    ("memory is not handed on", "return dict(deter=deter, stoch=stoch, action=action)",
     'return dict(deter=state["deter"], stoch=stoch, action=action)', ACTS, DISCRETE),
    ("the latent is not handed on", "return dict(deter=deter, stoch=stoch, action=action)",
     'return dict(deter=deter, stoch=state["stoch"], action=action)', ACTS, DISCRETE),
    ("acts without its previous action", 'state["action"][None], obs', '0 * state["action"][None], obs', ACTS,
     DISCRETE),
    ("memory crosses the border of episodes", 'obs["is_first"], state["deter"]', '~obs["is_first"], state["deter"]',
     ACTS, DISCRETE),
    ("evaluation draws the action", "noise if self.training else torch.ones_like(noise)", "noise",
     ACTS, DISCRETE),
    ("training takes the mode", "noise if self.training else torch.ones_like(noise)", "torch.ones_like(noise)", ACTS,
     DISCRETE),
    # resume
    ("a new optimiser", '        optimizer.load_state_dict(saved["optimizer"])\n', "", RESUMED, AGAIN),
    ("new weights", 'agent.load_state_dict(saved["agent"])', "pass", RESUMED, AGAIN),
    ("an empty replay", '        replay.load_state_dict(saved["replay"])\n', "", RESUMED, AGAIN),
    ("other random numbers", 'torch.set_rng_state(saved["rng"][0])', "pass", RESUMED, AGAIN),
    ("pretraining on resume", '(0, 0, 0)\n', '(0, 0, 0)\n    updates = 0\n', RESUMED, AGAIN),
    ("the due part of an update is forgotten", '("step", "updates", "learned"))', '("step", "updates", "step"))',
     RESUMED, AGAIN),
    ("the slow critic's clock starts again", 'register_buffer("updates", ',
     'register_buffer(persistent=False, name="updates", tensor=', RESUMED, AGAIN),
    ("the same episodes again", "rank * num_envs + step)", "rank * num_envs)",
     "test_resume:test_resumed_episodes_are_new"),
    ("a run that has ended is not evaluated again", "elif args.eval_episodes:",
     "elif args.eval_episodes and not saved:",
     "test_flags:test_evaluation_of_a_run_that_has_ended"),
    ("infinite weights are saved", "and not math.isfinite(value)", "and False",
     "test_bad_input:test_nan_weights_are_not_saved"),
    # update
    ("a value is read on the host", "metrics.update(ac_metrics)",
     "metrics.update(ac_metrics, x=loss.item() + 0 * loss)",
     "test_dispatch:test_no_host_reads_with_any_gradient", dict(discrete=True, actor_grad="reinforce")),
], dreamer_v3=[
    # pure functions
    ("time flipped in the return", "torch.stack(rets[:0:-1])", "torch.stack(rets[1:])", RETURN),
    ("reward of the state that is left", "[value[-1]], reward[1:] +", "[value[-1]], reward[:-1] +", RETURN),
    ("continue of the state that is left", "(live[1:] * lam[1:])", "(live[:-1] * lam[1:])", RETURN),
    ("bootstrap one step late", "(1 - lam[1:]) * value[1:]", "(1 - lam[1:]) * value[:-1]", RETURN),
    ("dyn trains the posterior", "categorical_kl(post.detach(), prior)", "categorical_kl(post, prior)", KL),
    ("rep trains the prior", "categorical_kl(post, prior.detach())", "categorical_kl(post, prior)", KL),
    ("KL sides exchanged", "return dyn.clamp(min=free_nats), rep.clamp(min=free_nats)",
     "return rep.clamp(min=free_nats), dyn.clamp(min=free_nats)", KL),
    ("free nats per group", "(log_p - log_q)).sum((-2, -1))", "(log_p - log_q)).sum(-1).clamp(min=1).sum(-1)",
     "test_math:test_free_nats_apply_to_the_sum_over_groups"),
    ("no uniform share in the KL", "post, prior = log_unimix(post_logits, mix)",
     "post, prior = log_unimix(post_logits, 0)", "test_golden_dreamer_v3:test_kl_losses"),
    ("sample not exactly one-hot", "keepdim=True), 1.0)", "keepdim=True), 0.9999999)",
     "test_math:test_sample_is_onehot_and_its_gradient_that_of_the_mixed_probabilities"),
    ("no straight-through gradient", "return grad, None", "return 0 * grad, None",
     "test_gradients:test_straight_through_gradient_is_that_of_the_probabilities"),
    ("exponential race upside down", "(probs / noise)", "(probs * noise)",
     "test_math:test_sample_frequencies"),
    ("two-hot weights exchanged", "picked[..., 0], picked[..., 1],", "picked[..., 1], picked[..., 0],",
     "test_golden_dreamer_v3:test_twohot", dict(dtype=torch.float64)),
    ("plain sum over the bins", "((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * bins[half + 1 :])",
     "(probs * bins)", "test_math:test_a_new_agent_predicts_zero_and_acts_at_random"),
    # replay
    ("newest sequences first", "torch.arange(first, self.online, device=self.device)",
     "torch.arange(first, self.online, device=self.device).flip(0)", QUEUE, FRESH),
    ("a fresh sequence is given twice", "first = max(self.online, -(", "first = max(self.online - 1, -(", QUEUE, FRESH),
    ("online queue overlaps", "1 + fresh // self.num_envs * length", "1 + fresh // self.num_envs * (length - 1)",
     QUEUE, FRESH),
    ("online queue begins at row 0", "= 1 + fresh // self", "= fresh // self", QUEUE, FRESH),
    ("stream and sequence exchanged", "fresh // self.num_envs * length, fresh % self.num_envs",
     "fresh % self.num_envs * length, fresh // self.num_envs", QUEUE, FRESH),
    ("sequences are fresh before they are whole", "(self.rows - 1) // length", "self.rows // length", QUEUE, FRESH),
    ("overwritten sequences are fresh", "first = max(self.online, -(-(oldest - 1) // length) * self.num_envs)",
     "first = self.online", FORGETS),
    ("sequences without their first row are fresh", "-(-(oldest - 1) // length)", "(oldest - 1) // length", FORGETS),
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
    ("an abandoned episode goes on", "batch[\"is_last\"][:-1] |= batch[\"is_first\"][1:]",
     "batch[\"is_last\"][1:] |= batch[\"is_first\"][:-1]", "test_replay:test_annotate"),
    ("forced reset missing", 'batch["is_first"][0] = True', 'batch["is_first"][0] |= False',
     "test_replay:test_annotate"),
    ("no shift of the previous action", 'batch["action"][:-1]', 'batch["action"][1:]', ACTING, dict(discrete=True)),
    ("no shift of the previous action", 'batch["action"][:-1]', 'batch["action"][1:]',
     "test_index:test_training_sequences"),
    ("context latents dropped", 'deter=batch["deter"][0]', 'deter=0 * batch["deter"][0]', ACTING, dict(discrete=True)),
    ("rows of a killed life pass for older ones", 'self.size = int((self.files["number"]',
     'self.size = len(newest) + 0 * int((self.files["number"]', KILLED_ROWS, dict(rows=25, more=4)),
    ("a row that a kill tore passes for the old one", "dict(number=((), torch.int64), **specs)",
     "dict(specs, number=((), torch.int64))", "test_replay:test_row_that_a_kill_tore",
     dict(rows=25, more=3, written=2)),
    ("rows have no number", "dict(row, number=self.rows)", "dict(row, number=0)", KILLED_ROWS, dict(rows=25, more=4)),
    ("files of another size", "if path.stat().st_size != count * dtype.itemsize:", "if False:",
     "test_replay:test_files_of_another_size_are_refused"),
    ("a lost file is made anew", "            if new:\n", "            if new or not path.exists():\n",
     "test_replay:test_missing_file_is_an_error", dict(name="n")),
    ("disk space is taken when it is too late", 'if hasattr(os, "posix_fallocate"):', "if False:",
     "test_bad_input:test_replay_takes_its_disk_space"),
    ("replay fills the memory of a GPU", "torch.cuda.mem_get_info(device)[0] / 2", "torch.cuda.mem_get_info(device)[0]",
     "test_replay:test_replay_is_on_a_gpu_where_it_fits_in_half_of_the_memory"),
    ("rows on a GPU are not saved", "file[at] = self.data[name][at] =", "self.data[name][at] =", THROUGH),
    ("rows are saved, but not on the GPU", "file[at] = self.data[name][at] =", "file[at] =", THROUGH),
    ("the queue begins anew on resume", "vars(self).update(state)", "self.rows = state['rows']",
     "test_replay:test_online_queue_after_a_kill"),
    ("replay is made anew on resume", "new=not saved)", "new=True)", "test_resume:test_resume_from"),
    ("replay is as long as the new flags say", 'saved["capacity"] if saved else ', "", "test_resume:test_resume_from"),
    # networks
    ("fan-in per block", "init(self, fan_in=inputs)", "init(self, fan_in=inputs // blocks)", INITIAL),
    ("truncation at 2 instead of 2 sigma", "-2 * sigma, 2 * sigma)", "-2, 2)", INITIAL),
    ("epsilon of a library", "self.weight, 1e-4)", "self.weight, 1e-6)",
     "test_golden_dreamer_v3:test_rms_norm"),
    ("norm in half precision", "F.rms_norm(at_least_float32(x),", "F.rms_norm(x,",
     "test_consistency:test_norms_and_softmaxes_are_fp32_in_bf16"),
    ("vectors not squashed", 'self.mlp(symlog(obs["vector"]))', 'self.mlp(obs["vector"])', ENCODER),
    ("average instead of max", "F.max_pool2d", "F.avg_pool2d", ENCODER),
    ("one output layer for all vectors", '(init(nn.Linear(units, n)) for n in shapes["vector"])',
     '(init(nn.Linear(units, n)) for n in [sum(shapes["vector"])])',
     "test_math:test_each_part_of_a_vector_has_its_own_output_layer"),
    ("mean over pixels", "- target).square().flatten(2).sum(-1)", "- target).square().flatten(2).mean(-1)",
     "test_golden_dreamer_v3:test_decoder"),
    ("upsampling phases exchanged", "for a in (1, 0)", "for a in (0, 1)", "test_math:test_upsampling_in_the_kernel"),
    # world model
    ("the action crosses a reset", "clamp(-1, 1) * keep", "clamp(-1, 1)", RESET),
    ("the state crosses a reset", "deter * k, stoch * k, noise)",
     "deter, stoch, noise)", RESET),
    ("no uniform share in the posterior sample", "return deter, sample_onehot(unimix(logits, self.mix)",
     "return deter, sample_onehot(unimix(logits, 0)", SCAN),
    ("no uniform share in the dream", "sample_onehot(unimix(self.prior(deter), self.mix)",
     "sample_onehot(unimix(self.prior(deter), 0)", "test_consistency:test_dreaming_is_observing_without_tokens"),
    ("update gate opened", "update - 1]", "update + 1]", SCAN),
    ("update gate inverted", "torch.lerp(blocks, torch.tanh(reset.sigmoid() * cand),",
     "torch.lerp(torch.tanh(reset.sigmoid() * cand), blocks,", SCAN),
    ("large actions not scaled", "prev_action.to(dtype).clamp(-1, 1)", "prev_action.to(dtype)", SCAN),
    ("gamma missing in the continue target", "target = (1 - rows[\"is_terminal\"].float()) * self.args.gamma",
     "target = 1 - rows[\"is_terminal\"].float()", CONTINUE),
    ("a time limit is a death", "target = (1 - rows[\"is_terminal\"]", "target = (1 - rows[\"is_last\"]", CONTINUE),
    # behaviour
    ("scale divided by a batch's own range", "ret.quantile(0.95)]), rate)", "ret.quantile(0.95)]), 1.0)", SCALE),
    ("scale with bias correction", "(self.percentiles[1] - self.percentiles[0]).clamp",
     "((self.percentiles[1] - self.percentiles[0]) / rate).clamp", SCALE),
    ("old and new exchanged in the average", "ret.quantile(0.95)]), rate)", "ret.quantile(0.95)]), 1 - rate)",
     SCALE),
    ("percentiles per time step", "torch.stack([ret.quantile(0.05), ret.quantile(0.95)])",
     "torch.stack([ret.view(3, -1).quantile(q, 1).mean() for q in (0.05, 0.95)])", SCALE),
    ("w_0 = 1", "weight = cont.cumprod(0)[:-1]",
     "weight = torch.cat([torch.ones_like(cont[:1]), cont[1:-1]]).cumprod(0)",
     "test_gradients:test_dream_from_a_terminal_state_teaches_nothing"),
    ("slow critic as target", "value = twohot_mean(value_logits.detach(), ",
     "value = twohot_mean(slow_logits.detach(), ", IMAGINED, dict(mix=1)),
    ("sign of the actor loss", "policy=-weight *", "policy=weight *", IMAGINED, dict(mix=1)),
    ("sign of the entropy", "+ self.args.ent_coef * bonus", "- self.args.ent_coef * bonus", IMAGINED, dict(mix=1)),
    ("no uniform share in the policy", "log_unimix(raw, self.args.actor_unimix)", "log_unimix(raw, 0.0)", IMAGINED,
     dict(mix=1)),
    ("truncated rows train the critic", "return going_on[:-1] * self.value_loss", "return self.value_loss",
     ENDINGS),
    ("truncation ends the replay return", 'going_on = (1 - rows["is_terminal"]', 'going_on = (1 - rows["is_last"]',
     ENDINGS),
    ("the return crosses an end", "going_on * self.args.lam)", "torch.full_like(boot, self.args.lam))",
     ENDINGS),
    ("replay critic on detached states", 'feat = torch.cat([post["deter"], post["stoch"]], -1)',
     'feat = torch.cat([post["deter"], post["stoch"]], -1).detach()', REACH, dict(loss="repval", discrete=True)),
    ("the actor bends the continue head", "with torch.no_grad():  # the behaviour must",
     "if True:  # the behaviour must", REACH, dict(loss="policy", discrete=True)),
    ("the critic bends the dream", "@torch.no_grad()  # REINFORCE", "# REINFORCE", REACH,
     dict(loss="value", discrete=True)),
    ("gradient through the advantage", "/ scale).detach()", "/ scale)",
     "test_gradients:test_targets_of_actor_and_critic_are_constants"),
    ("gradient through the return", "ret.detach(), self.bins", "ret, self.bins",
     "test_gradients:test_targets_of_actor_and_critic_are_constants"),
    ("slow critic wants gradients", "255, scale=0.0).requires_grad_(False)", "255, scale=0.0)",
     "test_gradients:test_slow_critic_has_no_gradient"),
    ("dreams handed to other sequences", "ret[0].unflatten(0, feat.shape[:2])", "ret[0].view(feat.shape[1], -1).T",
     "test_consistency:test_batch_elements_are_independent"),
    ("bootstrap with the last imagined return", "self.slow_critic(feat.detach()), ret[0]",
     "self.slow_critic(feat.detach()), ret[-1]",
     TOTAL),
    ("no slow critic in the value loss", " + twohot_loss(logits, slow_value, self.bins)", "", TOTAL),
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
    ("latents of weights that diverged", "**{k: v.nan_to_num() for k, v in post.items()}", "**post",
     "test_bad_input:test_diverged_run_can_go_on"),
    ("the slow critic keeps its history", "[p.data for p in m.parameters()]", "[*m.parameters()]", HISTORY),
    # environment and loop
    ("returns go on over the end of episodes", "np.where(first, 0, self.ret + reward)", "self.ret + reward", COUNTED,
     dict(env_id="Terminated-v0", terminal=True)),
    ("a resetting row is a step of the episode", "np.where(first, 0, self.length + 1)", "self.length + 1", COUNTED,
     dict(env_id="Terminated-v0", terminal=True)),
    ("vectors are rendered", "args.image_size, args.pixels)", "args.image_size, args.pixels or None)",
     "test_flags:test_every_kind_of_environment", dict(kind="vectors")),
    ("another resize", 'mode="bilinear", antialias=True', 'mode="bilinear"',
     "test_env:test_atari_frames_and_rewards", dict(gray=False)),
    ("vectors in another order", "-1)) for k in self.vectors]", "-1)) for k in self.vectors[::-1]]",
     "test_env:test_dict_observations"),
    ("images in another order", "1, 2) for k in self.images]", "1, 2) for k in self.images[::-1]]",
     "test_env:test_dict_observations"),
    ("truncation is a death", "is_terminal=death)", "is_terminal=self.over)", ROWS),
    ("an action after the end", 'state["action"] *= torch', 'state["action"] *= 1 | torch', ROWS),
    ("resetting rows are steps", 'torch.tensor([(~row["is_first"]).sum()', "torch.tensor([num_envs",
     "test_index:test_steps_are_decisions"),
    ("nothing is due at the end", " or step >= args.total_timesteps\n", "\n", SAVED),
    ("infinite weights are saved", "and not math.isfinite(value)", "and False",
     "test_bad_input:test_nan_weights_are_not_saved"),
    ("looking draws the run's random numbers", "torch.random.fork_rng([device] if cuda else [])", "torch.no_grad()",
     "test_resume:test_looking_changes_nothing"),
    # checkpoint and resume
    ("a checkpoint is written in its place", 'os.replace(run / "checkpoint.tmp", run / "checkpoint.pt")',
     'file = open(run / "checkpoint.pt", "wb", 0)\n    file.write(buffer.getbuffer())',
     "test_resume:test_death_inside_save"),
    ("the old checkpoint goes first", '    os.replace(run / "checkpoint.tmp"',
     '    (run / "checkpoint.pt").unlink(missing_ok=True)\n    os.replace(run / "checkpoint.tmp"',
     "test_resume:test_death_inside_save"),
    ("checkpoints of other versions", ' or saved["args"].keys() != {f.name for f in fields(Args)}', "", DAMAGED,
     dict(case="an older version")),
    ("new weights", 'agent.load_state_dict(saved["agent"])', "pass", RESUMED, dict(how="SIGTERM")),
    ("other random numbers", 'torch.set_rng_state(saved["rng"][0])', "pass", RESUMED, dict(how="SIGTERM")),
    ("flags of the run are forgotten", 'Args(**load_checkpoint(Path(run))["args"]) if run else ', "",
     "test_resume:test_flags_override_the_saved_ones"),
    ("a new optimiser", 'torch._foreach_copy_(self.state_dict()["state"], saved["state"])', "pass", RESUMED,
     dict(how="SIGTERM")),
    ("the due part of an update is forgotten", '("step", "updates", "learned"))', '("step", "updates", "step"))',
     RESUMED, dict(how="SIGTERM")),
    ("a part of an update is lost", "learned + count / ratio if updates else stored", "stored", RATIO),
    ("no first update", "* ratio) if updates else 1", "* ratio)", RATIO),
    ("the same episodes again", "rank * num_envs + step)", "rank * num_envs)",
     "test_resume:test_resumed_episodes_are_new"),
    ("the oldest run", "max(files, key", "min(files, key", "test_resume:test_resume_auto"),
    ("runs of other seeds", "__{args.seed}__", "__{args.seed}", "test_resume:test_resume_auto"),
    ("a run that has ended is not evaluated again", "elif args.eval_episodes:",
     "elif args.eval_episodes and not saved:",
     "test_flags:test_evaluation_of_a_run_that_has_ended"),
    ("ranks draw the same after a resume", "if rank == 0:  # the others", "if True:  # the others", DRAWS),
    ("more episodes of short ones", "episodes[:quota] for", "episodes for",
     "test_flags:test_evaluation_favours_no_environment", dict(episodes=20, num_envs=16)),
    ("an evaluation like training", "agent.eval().initial", "agent.train().initial",
     "test_flags:test_evaluation_favours_no_environment", dict(episodes=20, num_envs=16)),
    ("missing weights are random", 'fail(f"the run has other', 'print(f"the run has other',
     "test_bad_input:test_checkpoint_without_some_weights", dict(part="actor")),
    ("a lost row is skipped", "== newest).cumprod(0).sum()", "== newest).sum()",
     "test_replay:test_rows_that_never_reached_the_disk"),
    ("a second Ctrl-C waits too", "if number == signal.SIGINT:", "if False:", "test_resume:test_second_signal",
     dict(number="SIGINT")),
    ("a second SIGTERM kills", "if number == signal.SIGINT:", "if True:", "test_resume:test_second_signal",
     dict(number="SIGTERM")),
])


def mutate(name, old, new, folder):
    """The script with one text replaced, as a file of the same name in the folder, and as a module of its own."""
    source, path = (ROOT / f"{name}.py").read_text(), folder / f"{name}.py"
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"mutated_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


class Captured:
    """What `capsys` and `capfd` give a test, from two texts that are being written."""

    def __init__(self, out, err):
        self.files = out, err

    def readouterr(self):
        texts = [file.getvalue() for file in self.files]
        for file in self.files:
            file.seek(0), file.truncate()
        return SimpleNamespace(out=texts[0], err=texts[1])


def make_fixture(tests, name, values):
    """Add to the values that of a fixture of this test file, after those that it needs itself."""
    function = inspect.unwrap(getattr(tests, name))
    needed = inspect.signature(function).parameters
    for other in [k for k in needed if k not in values]:
        make_fixture(tests, other, values)
    value = function(**{k: values[k] for k in needed})
    values[name] = next(value) if inspect.isgenerator(value) else value


def check(name, module, where, arguments, folder):
    """Call the test function `file:name` on a module: it takes that as `m` or `v3`, it or a test file that it uses has
    it as a global, loads it by its name or runs its file. Fixtures about several scripts are made here, those about
    one by their own functions; a script that refuses has failed."""
    file, function = where.split(":")
    tests, out, err = importlib.import_module(file), io.StringIO(), io.StringIO()
    test, original, captured = getattr(tests, function), load(name), Captured(out, err)
    wanted = inspect.signature(test).parameters
    torch.manual_seed(0)
    own = pytest.MonkeyPatch.context()  # what the test undoes is not the module
    with pytest.MonkeyPatch.context() as patch, own as monkeypatch, redirect_stdout(out), redirect_stderr(err):
        for user in [user for user in sys.modules.values() if getattr(user, "__file__", None)]:
            if Path(user.__file__).parent != TESTS or user.__name__ in ("conftest", __name__):
                continue
            changes = {key: module for key, value in vars(user).items() if value is original}
            changes |= dict(load=lambda _: module, ROOT=Path(module.__file__).parent)
            for key in changes.keys() & vars(user).keys():
                patch.setattr(user, key, changes[key])
        values = dict(m=module, v3=module, name=name, monkeypatch=monkeypatch, tmp_path=folder / "tmp",
                      capsys=captured, capfd=captured) | arguments
        values["tmp_path"].mkdir()
        try:
            if "played" in wanted:
                values["played"] = test_index.play(folder / "played", *test_index.MUTATED[name])
            if {"finished", "run"} & wanted.keys():
                flags = test_resume.scripted(name, folder / "finished", save_every=10)
                assert test_resume.execute(name, *flags) == 0
                values["finished"] = values["run"] = name, test_resume.only(folder / "finished")
            for fixture in [k for k in wanted if k not in values and hasattr(tests, k)]:
                make_fixture(tests, fixture, values)
            captured.readouterr()
            test(**{k: values[k] for k in wanted if k in values})
        except SystemExit as end:
            raise AssertionError(err.getvalue()) from end


class Frozen(dict):
    """Arguments as a key of the cache."""

    def __hash__(self):
        return hash(repr(self))


@functools.cache
def whole_script_passes(name, where, arguments):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a writer may still be at work
        check(name, load(name), where, dict(arguments), Path(folder))


@pytest.mark.filterwarnings("ignore:.*render_mode")
@pytest.mark.parametrize("name, what, old, new, where, arguments", [
    pytest.param(name, what, old, new, where, *arguments or [{}], id=f"{name}-{what.replace(' ', '_')}")
    for name, entries in MUTATIONS.items() for what, old, new, where, *arguments in entries])
def test_breakage_is_noticed(name, what, old, new, where, arguments, tmp_path):
    whole_script_passes(name, where, Frozen(arguments))
    broken = mutate(name, old, new, tmp_path)  # not below: that the text is not there is no success
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(name, broken, where, arguments, tmp_path)
