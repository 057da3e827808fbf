"""Put faults into the library, one at a time, and see whether the tests notice.

    python tests/mutation.py [--only NAME,NAME] [--jobs 2] [--list]

Every fault is made in a copy; the checkout is not touched. The exit code is 0 if at least
95 % of the faults were noticed. A survivor asks for a test that looks at a value.

A fault takes about four seconds, half a minute where processes are started; 57 of them took
five minutes on two cores that others used too. `--only rollout.py` is one module.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
WANTED = 0.95
PATIENCE = 1200  # seconds; a test that hangs has noticed, one that waits for a CPU has not
# Libraries are imported once; each run of tests is a fork of what has imported them.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "gymnasium", "pytest", "stable_baselines3", "transformers.models.llama.modeling_llama"]
)
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; forks share no threads


class Fault(NamedTuple):
    name: str
    file: str   # of the package
    old: str    # text that stands in it once
    new: str    # what stands there instead
    tests: str  # arguments of pytest, in tests/


FAULTS = [
    # Foundations
    Fault("refuted-equal", "verify.py", "if not error > atol:", "if not error >= atol:", "test_verify.py"),
    Fault("holds-mean", "verify.py", "error = np.abs(a - b).max()\n    if not error <= atol", "error = np.abs(a - b).mean()\n    if not error <= atol", "test_verify.py"),
    Fault("draw-left", "mdp.py", "u, right=True)", "u)", "test_mdp.py"),
    Fault("variation-half", "trust_region.py", ".abs().sum(-1) / 2", ".abs().sum(-1)", "test_trust_region.py"),
    Fault("normalize-eps", "advantage.py", "(std + eps).clamp", "(std**2 + eps).sqrt().clamp", "test_advantage.py"),
    Fault("gae-lambda", "advantage.py", "return backward_sum(delta, done, gamma * lam, overwrite=True)", "return backward_sum(delta, done, gamma, overwrite=True)", "test_advantage.py"),
    Fault("gae-cut", "advantage.py", "return backward_sum(delta, done, gamma * lam, overwrite=True)", "return backward_sum(delta, terminated, gamma * lam, overwrite=True)", "test_advantage.py"),
    Fault("clip-fraction", "ppo.py", "(rho != rho.clamp(1 - clip_low, 1 + clip_high))", "(rho != rho.clamp(1 - clip_low, 1 + clip_low))", "test_ppo.py"),
    Fault("clip-low", "ppo.py", "return torch.minimum(rho * advantages, rho.clamp(1 - low, 1 + high)", "return torch.minimum(rho * advantages, rho.clamp(1 - high, 1 + high)", "test_ppo.py"),
    Fault("value-clip", "ppo.py", "return torch.maximum(error, (near - returns) ** 2) / 2", "return (near - returns) ** 2 / 2", "test_ppo.py"),
    # Policies
    Fault("gain-swapped", "policies.py", "scale = gain if last else math.sqrt(2)", "scale = math.sqrt(2) if last else gain", "test_policies.py"),
    Fault("actor-gain", "policies.py", "actor = network(obs_dim, hidden, out_dim, 0.01, generator)", "actor = network(obs_dim, hidden, out_dim, 1.0, generator)", "test_policies.py"),
    Fault("critic-seed", "policies.py", "critic = network(obs_dim, hidden, 1, 1.0, generator)", "critic = network(obs_dim, hidden, 1, 1.0)", "test_policies.py test_seeds.py"),
    Fault("normalizer-share", "policies.py", "share * (1 - share) * gap**2", "share * gap**2", "test_policies.py"),
    Fault("normalizer-cut", "policies.py", ".clamp(-10, 10)", ".clamp(-5, 5)", "test_policies.py"),
    Fault("gaussian-entropy", "policies.py", "entropy = (log_norm + 0.5)", "entropy = (log_norm + 1.0)", "test_policies.py"),
    Fault("gaussian-noise", "policies.py", "(mean + self.log_std.exp() * noise)", "(mean + self.log_std * noise)", "test_policies.py"),
    Fault("eval-explores", "policies.py", "self.epsilon if self.training else 0.0", "self.epsilon", "test_policies.py"),
    Fault("eval-noise", "policies.py", "sigma = self.sigma if self.training else 0.0", "sigma = self.sigma", "test_policies.py"),
    Fault("half-width", "policies.py", "(high - low) / 2)", "(high - low))", "test_policies.py"),
    # Rollout
    Fault("action-clamp", "rollout.py", "shaped = np.clip(shaped, space.low, space.high)", "pass", "test_rollout.py"),
    Fault("action-start", "rollout.py", "return array + space.start if space.start else array", "return array", "test_rollout.py"),
    Fault("restart-valid", "rollout.py", "self.restarting = done\n        elif", "self.restarting = terminated\n        elif", "test_rollout.py"),
    Fault("final-observation", "rollout.py", "next_obs[torch.from_numpy(done)] = self._tensor(final)", "pass", "test_rollout.py"),
    Fault("critic-truncation", "batch.py", "flags = each(rollout.terminated), each(rollout.done)", "flags = each(rollout.done), each(rollout.done)", "test_batch.py"),
    Fault("critic-returns", "batch.py", '"returns": advantages + values,', '"returns": advantages,', "test_batch.py"),
    Fault("evaluate-mode", "rollout.py", "policy.train(training)\n", "policy.train()\n", "test_rollout.py"),
    Fault("evaluate-rounds", "rollout.py", "first = None if returns else starts", "first = starts", "test_rollout.py"),
    Fault("returns-valid", "rollout.py", "(rollout.rewards * rollout.valid).double()", "rollout.rewards.double()", "test_rollout.py"),
    Fault("minibatch-order", "batch.py", "order = torch.randperm(rows, generator=generator, device=generator.device)", "order = torch.arange(rows)", "test_batch.py"),
    Fault("scale-valid", "batch.py", "x = torch.where(valid, rewards.double(), 0)", "x = rewards.double()", "test_batch.py"),
    Fault("scale-carried", "batch.py", "    x[0] += self.gamma * self.so_far\n", "", "test_batch.py"),
    Fault("scale-ends", "batch.py", "before = cut.roll(1, 0)", "before = cut", "test_batch.py"),
    Fault("scale-used", "train.py", "rollout = replace(rollout, rewards=scaled)", "pass", "test_train.py -k units"),
    # Environments made of tensors
    Fault("cartpole-limit", "tensor_env.py", "max_episode_steps = 500", "max_episode_steps = 501", "test_tensor_env.py"),
    Fault("cartpole-steps", "tensor_env.py", "steps.masked_fill(done, 0)", "steps.masked_fill(terminated, 0)", "test_tensor_env.py"),
    Fault("cartpole-start", "tensor_env.py", "-0.05, 0.05, generator", "-0.5, 0.5, generator", "test_tensor_env.py"),
    Fault("cartpole-final", "tensor_env.py", '"final_obs": final.float()', '"final_obs": self.state.float()', "test_tensor_env.py"),
    # Seeds
    Fault("spawn-more", "rollout.py", "spawn_key=(STREAMS.index(use), *more)", "spawn_key=(STREAMS.index(use),)", "test_seeds.py"),
    Fault("spawn-use", "rollout.py", "spawn_key=(STREAMS.index(use), *more)", "spawn_key=(0, *more)", "test_seeds.py"),
    Fault("spawn-size", "rollout.py", "generate_state(1)[0] >> 1)", "generate_state(1)[0])", "test_seeds.py"),
    Fault("spawn-sign", "rollout.py", "    check_at_least(0, seed=seed)\n", "", "test_seeds.py"),
    Fault("evaluate-apart", "rollout.py", 'spawn_seed(seed, "evaluation", i) for i in range(2))', 'spawn_seed(seed, "evaluation", 0) for _ in range(2))', "test_seeds.py"),
    Fault("evaluate-raw", "rollout.py", 'starts, actions = (spawn_seed(seed, "evaluation", i) for i in range(2))', "starts = actions = seed", "test_seeds.py"),
    Fault("weights-stream", "algorithm.py", 'config, seeds["weights"])', "config, seed)", "test_seeds.py"),
    Fault("starts-stream", "algorithm.py", 'device, seeds["starts"])', "device, seed)", "test_seeds.py"),
    Fault("order-stream", "algorithm.py", 'for use in ("actions", "minibatches")', 'for use in ("actions", "actions")', "test_seeds.py"),
    Fault("given-seed", "algorithm.py", "        torch.default_generator.manual_seed(seed)\n", "", "test_runner.py -k drawn_before"),
    Fault("given-global", "algorithm.py", "with torch.random.fork_rng(devices=[]):", "if True:", "test_runner.py -k shared_layer"),
    Fault("evaluation-step", "runner.py", 'spawn_seed(run.seed, "evaluation", row["steps"])', 'spawn_seed(run.seed, "evaluation")', "test_seeds.py"),
    Fault("evaluation-seed", "runner.py", 'spawn_seed(run.seed, "evaluation", row["steps"])', "run.seed", "test_seeds.py"),
    Fault("restart-seed", "runner.py", 'spawn_seed(run.seed, "starts", run.steps)', 'spawn_seed(run.seed, "starts")', "test_resume.py -k captured"),
    Fault("restart-sum", "learner.py", "                part.so_far.zero_()", "                pass", "test_resume.py -k captured"),
    # Gradients, trust regions, values, ratios
    Fault("returns-stop", "policy_gradient.py", "        stop[-1] = True  # there are no data below the last row\n", "", "test_policy_gradient.py"),
    Fault("returns-chunk", "policy_gradient.py", "            decays[t].mul_(decays[t + 1])\n", "", "test_policy_gradient.py test_advantage.py"),
    Fault("baseline-square", "policy_gradient.py", "weight = pi * (1 - 2 * pi + pi.square().sum(-1, keepdim=True))", "weight = pi * (1 - pi)", "test_policy_gradient.py"),
    Fault("lambda-last", "advantage.py", "    stop[-1] = True  # there are no data below the last row\n", "", "test_advantage.py"),
    Fault("lambda-known", "advantage.py", "torch.where(stop, follows, (1 - lam) * follows)", "(1 - lam) * follows", "test_advantage.py"),
    Fault("n-steps", "advantage.py", "range(min(n, len(delta)) - 1)", "range(min(n, len(delta)))", "test_advantage.py"),
    Fault("flags-swapped", "advantage.py", "if readable(done) and (terminated > done)", "if readable(done) and (terminated < done)", "test_advantage.py"),
    Fault("fvp-damping", "natural_gradient.py", "return _flat(rows).add_(v, alpha=damping)", "return _flat(rows)", "test_natural_gradient.py"),
    Fault("cg-tolerance", "natural_gradient.py", "if size <= tol * start:", "if size <= tol:", "test_natural_gradient.py"),
    Fault("search-kl", "natural_gradient.py", "if gain > 0 and kl <= max_kl:", "if gain > 0:", "test_natural_gradient.py"),
    Fault("search-gain", "natural_gradient.py", "if gain > 0 and kl <= max_kl:", "if kl <= max_kl:", "test_natural_gradient.py"),
    Fault("search-back", "natural_gradient.py", "            _place(params, start)\n    return", "            pass\n    return", "test_natural_gradient.py"),
    Fault("natural-length", "natural_gradient.py", "sqrt(2 * max_kl / curvature)", "sqrt(max_kl / curvature)", "test_natural_gradient.py"),
    Fault("greedy-share", "value_based.py", "epsilon / q.shape[-1]", "epsilon / (q.shape[-1] - 1)", "test_value_based.py -k greedy"),
    Fault("q-half", "value_based.py", "return mse_loss(chosen, targets) / 2", "return mse_loss(chosen, targets)", "test_value_based.py -k loss"),
    Fault("soft-share", "value_based.py", "torch._foreach_lerp_(old, new, tau)", "torch._foreach_lerp_(old, new, 1 - tau)", "test_value_based.py -k target or soft"),
    Fault("weighted-total", "off_policy.py", "return estimates.sum() / total", "return estimates.mean()", "test_off_policy.py"),
    Fault("ess-scale", "off_policy.py", "share = weights / largest", "share = weights", "test_off_policy.py"),
    Fault("explore-bound", "off_policy.py", "return (actions + sigma * noise).clamp(low, high)", "return actions + sigma * noise", "test_off_policy.py"),
    Fault("kl-k2", "kl.py", '"k2": lambda log_u: log_u**2 / 2', '"k2": lambda log_u: log_u**2', "test_kl.py"),
    Fault("kl-k1", "kl.py", '"k1": lambda log_u: -log_u', '"k1": lambda log_u: log_u', "test_kl.py"),
    Fault("k3-digits", "ppo.py", "return log_ratio.expm1() - log_ratio", "return log_ratio.exp() - 1 - log_ratio", "test_ppo.py -k kl"),
    Fault("dual-clip", "ppo.py", "rho = rho if dual is None else rho.clamp(max=dual)", "rho = rho if dual is None else rho.clamp(max=1 + high)", "test_ppo.py -k dual"),
    Fault("no-band", "ppo.py", "return 1.0, math.inf  # a ratio is never negative", "return 1.0, 1.0", "test_ppo.py -k without_a_clip"),
    Fault("entropy-bonus", "ppo.py", "loss = loss - entropy_coef * entropy", "loss = loss + entropy_coef * entropy", "test_ppo.py -k equals"),
    Fault("draw-clock", "policies.py", "(logits - clocks.log_().clamp_(min=-1e3))", "(logits - clocks.log_())", "test_policies.py -k clock"),
    Fault("mode-drawn", "rollout.py", "return policy.distribution(obs).mode", "return policy.distribution(obs).sample()", "test_rollout.py -k deterministic"),
    Fault("reward-finite", "rollout.py", '        _check_finite("reward", rewards)\n', "", "test_runner.py -k name_the_environment"),
    Fault("total-steps", "runner.py", "self.steps >= self.config.total_steps", "self.steps > self.config.total_steps", "test_runner.py -k hundred"),
    Fault("stop-saves", "runner.py", "due = stop or run.finished", "due = run.finished", "test_resume.py -k report_stops"),
    Fault("holds-a-run", "checkpoint.py", "    if path.exists():\n        hint", "    if False:\n        hint", "test_resume.py -k untouched"),
    Fault("eval-env", "runner.py", "env = self.env if self.eval_env is None else self.eval_env", "env = self.env", "test_runner.py -k eval_env"),
    Fault("close-given", "runner.py", "if learner.stepper.env is not run.env:", "if True:", "test_runner.py -k left_open"),
    Fault("diverged", "runner.py", 'if not metrics.pop("finite"):', 'if metrics.pop("finite") < 0:', "test_resume.py -k diverges"),
    Fault("report-two", "runner.py", "for p in parameters) >= 3", "for p in parameters) >= 1", "test_runner.py -k report"),
    Fault("group-others", "grpo.py", "return size / (size - 1) * _centred(rewards)", "return _centred(rewards)", "test_grpo.py -k leave"),
    Fault("group-deviation", "grpo.py", 'over = 1 if scale == "group" else (0, 1)', "over = 1", "test_grpo.py -k batch_scale"),
    Fault("weights-type", "grpo.py", "ones = mask.to(dtype or torch.get_default_dtype())", "ones = mask.to(torch.get_default_dtype())", "test_grpo.py"),
    Fault("weights-sample", "grpo.py", "mask.sum(1, keepdim=True).clamp(min=1))", "mask.sum().clamp(min=1))", "test_grpo.py"),
    Fault("upweight-share", "dapo.py", "torch.where(keep[:, None], advantages / share, 0)", "torch.where(keep[:, None], advantages, 0)", "test_dapo.py"),
    Fault("overlong", "dapo.py", "return ((max_len - cache - lengths) / cache).clamp(-1, 0)", "return ((max_len - lengths) / cache).clamp(-1, 0)", "test_dapo.py"),
    # What a GPU is not waited for
    Fault("readable-graph", "checks.py", 'x.device.type == "cpu" and not torch.compiler.is_compiling()', 'x.device.type == "cpu"', "test_runner.py -k one_graph"),
    Fault("readable-device", "checks.py", 'x.device.type == "cpu" and not', "not", "test_checks.py"),
    Fault("numbers-order", "runner.py", "(metrics | dict(zip(far, read)))", "(metrics | dict(zip(far, read[::-1])))", "test_runner.py -k together"),
    Fault("transitions-look", "rollout.py", "return column.flatten(0, 1) if self.complete else column[self.valid]", "return column[self.valid]", "test_waiting.py"),
    # Rows that are no transitions
    Fault("complete-mode", "rollout.py", "self.complete = self.mode != AutoresetMode.NEXT_STEP", "self.complete = self.mode == AutoresetMode.SAME_STEP", "test_rollout.py -k every_mode"),
    Fault("complete-next", "rollout.py", "self.complete = self.mode != AutoresetMode.NEXT_STEP", "self.complete = True", "test_rollout.py -k every_mode"),
    Fault("complete-episodes", "rollout.py", "_rollout([*_episodes(policy, stepper, generator, seed, max_steps)])", "_rollout([*_episodes(policy, stepper, generator, seed, max_steps)], stepper.complete)", "test_tensor_env.py -k one_episode"),
    Fault("complete-mask", "rollout.py", "return None if self.complete else self.valid", "return self.valid", "test_batch.py"),
    Fault("episodes-alive", "rollout.py", "alive = valid & ~(terminated | truncated)", "alive = valid & ~terminated", "test_rollout.py -k one_episode or without_an_end or episodes"),
    Fault("episodes-ended", "rollout.py", "ends = rollout.done & rollout.valid", "ends = rollout.done", "test_rollout.py -k whole_episodes"),
    Fault("play-valid", "rollout.py", "(rewards.float() * valid).sum(0)", "rewards.float().sum(0)", "test_rollout.py -k plain_loop"),
    Fault("batch-no-mask", "batch.py", "    if mask is not None:\n", "    if False:\n", "test_batch.py"),
    Fault("batch-mask-flip", "batch.py", 'table["mask"] = each(mask)', 'table["mask"] = each(~mask)', "test_batch.py"),
    Fault("scale-lost", "batch.py", "self._returns(rewards, done | ~valid, valid)", "self._returns(rewards, done, valid)", "test_batch.py"),
    Fault("deviation-mask", "advantage.py", "away.square().sum() / count.clamp(min=1)", "away.square().sum() / x.numel()", "test_advantage.py"),
    Fault("deviation-rest", "advantage.py", "    (away,) = keep(mask, away - away.sum() / count.clamp(min=1))", "    away = away - away.sum() / count.clamp(min=1)", "test_advantage.py"),
    Fault("reinforce-mask", "train.py", "psi = normalize(returns, rollout.valid)", "psi = normalize(returns)", "test_train.py -k no_transitions"),
    Fault("reinforce-entropy", "train.py", "masked_mean(entropy.detach(), rollout.valid)", "entropy.detach().mean()", "test_train.py -k no_transitions"),
    Fault("a2c-mask", "train.py", "-now * learner.group.normalize(advantages, mask)", "-now * learner.group.normalize(advantages)", "test_train.py -k no_transitions"),
    Fault("a2c-mask-mean", "train.py", "mean = {name: masked_mean(x, mask) for", "mean = {name: x.mean() for", "test_train.py -k no_transitions"),
    Fault("ppo-mask-advantages", "train.py", "            advantages = group.normalize(advantages, mask)\n", "            advantages = group.normalize(advantages)\n", "test_train.py -k no_transitions"),
    Fault("ppo-mask-loss", "train.py", "total = ppo_loss(*data, **clip, **coefs, mask=mask)", "total = ppo_loss(*data, **clip, **coefs)", "test_train.py -k no_transitions"),
    Fault("ppo-mask-kl", "train.py", "beta * masked_mean(approx_kl(now, logp), mask)", "beta * approx_kl(now, logp).mean()", "test_train.py -k no_transitions"),
    Fault("ppo-mask-metrics", "train.py", 'for name in ("returns", "mask") if name in batch', 'for name in ("returns",) if name in batch', "test_train.py -k no_transitions"),
    Fault("trpo-mask-advantages", "train.py", 'normalize(batch["advantages"], mask)', 'normalize(batch["advantages"])', "test_train.py -k no_transitions"),
    Fault("trpo-mask-gain", "train.py", 'masked_mean(ratio(logp, batch["logp"]) * advantages, mask)', '(ratio(logp, batch["logp"]) * advantages).mean()', "test_train.py -k masked"),
    Fault("trpo-mask-kl", "train.py", "masked_mean(kl_divergence(old, policy.distribution(obs)), mask)", "kl_divergence(old, policy.distribution(obs)).mean()", "test_train.py -k no_transitions"),
    Fault("trpo-mask-value", "train.py", "masked_mean(value_loss(policy.value(obs), returns), mask)", "value_loss(policy.value(obs), returns).mean()", "test_train.py -k no_transitions"),
    Fault("loss-mask", "ppo.py", "return masked_mean(loss, mask)", "return loss.mean()", "test_ppo.py -k mask"),
    Fault("mean-mask", "ppo.py", "    (x,) = keep(mask, x)\n", "", "test_ppo.py -k mask"),
    Fault("explained-mask", "ppo.py", "return masked_mean((x - masked_mean(x, mask)) ** 2, mask, math.nan)", "return ((x - masked_mean(x, mask)) ** 2).mean()", "test_ppo.py -k mask"),
    # The learner
    Fault("flat-padding", "learner.py", "sizes = [-(-p.numel() // 16) * 16 for p in parameters]", "sizes = [p.numel() for p in parameters]", "test_runner.py -k flat"),
    Fault("flat-padding-half", "learner.py", "sizes = [-(-p.numel() // 16) * 16 for p in parameters]", "sizes = [-(-p.numel() // 8) * 8 for p in parameters]", "test_runner.py -k flat"),
    Fault("flat-values", "learner.py", "p.data, p.grad = data.copy_(p), grad", "p.data, p.grad = data, grad", "test_runner.py -k flat"),
    Fault("flat-grad", "learner.py", "p.data, p.grad = data.copy_(p), grad", "p.data, p.grad = data.copy_(p), grad.clone()", "test_runner.py -k flat"),
    Fault("set-place", "learner.py", "here.fill_(x)", "self.policy.register_buffer(name, torch.tensor(x), False)", "test_learner.py"),
    Fault("set-plain", "learner.py", "                setattr(self.policy, name, x)\n", "                pass\n", "test_learner.py"),
    Fault("lr-place", "learner.py", 'group["lr"].fill_(lr)', 'group["lr"] = torch.tensor(lr)', "test_learner.py"),
    Fault("step-zero", "learner.py", "        self.weights.grad.zero_()\n        loss.backward()\n", "        loss.backward()\n", "test_learner.py"),
    Fault("step-norm", "learner.py", "grad.mul_((max_grad_norm / (length + 1e-6)).clamp(max=1.0))", "pass", "test_learner.py"),
    Fault("step-longer", "learner.py", "(max_grad_norm / (length + 1e-6)).clamp(max=1.0)", "max_grad_norm / (length + 1e-6)", "test_learner.py"),
    Fault("minimise-norm", "learner.py", "self.step(value, max_grad_norm)", "self.step(value)", "test_learner.py"),
    Fault("metrics-last", "learner.py", "torch.stack([m[k] for m in history]).mean()", "history[-1][k]", "test_train.py -k mean_value_loss"),
    Fault("number-place", "learner.py", "return self.numbers[name].fill_(x)", "return torch.zeros_like(self.numbers[name]).fill_(x)", "test_learner.py"),
    Fault("number-type", "learner.py", "here = dict(dtype=torch.float32,", "here = dict(dtype=torch.float64,", "test_learner.py"),
    Fault("ready-shape", "learner.py", "key = name, *((n, x.shape) for n, x in tensors.items())", "key = name", "test_learner.py"),
    Fault("ready-never", "learner.py", "if key not in self.ready:", "if True:", "test_learner.py"),
    Fault("compiled-norm", "learner.py", "super().minimise(name, fused, max_grad_norm, **inputs)", "super().minimise(name, fused, **inputs)", "test_learner.py"),
    Fault("compiled-steps", "learner.py", "        self.stepper.compile()\n", "", "test_learner.py"),
    Fault("compiled-env", "tensor_env.py", "        if self.after is _after:\n", "        if True:\n", "test_learner.py"),
    Fault("recorded-actions", "learner.py", "Recorded(function, [self.generator, self.order, own])", "Recorded(function, [self.order, own])", "test_learner.py"),
    Fault("recorded-order", "learner.py", "Recorded(function, [self.generator, self.order, own])", "Recorded(function, [self.generator, own])", "test_learner.py"),
    Fault("recorded-starts", "learner.py", "Recorded(function, [self.generator, self.order, own])", "Recorded(function, [self.generator, self.order])", "test_learner.py"),
    Fault("recorded-input", "learner.py", "            self.stepper.obs = obs\n", "", "test_learner.py"),
    Fault("recorded-next", "learner.py", '"following": self.stepper.obs\n', '"following": obs\n', "test_learner.py"),
    Fault("recorded-complete", "learner.py", "Rollout(**columns, complete=self.stepper.complete)", "Rollout(**columns)", "test_learner.py"),
    Fault("backend-here", "learner.py", 'here = device.type == "cuda" and isinstance(stepper, TensorStepper)', 'here = device.type == "cuda"', "test_learner.py"),
    Fault("policy-trains", "algorithm.py", "return policy.train()", "return policy", "test_runner.py -k module_is_trained"),
    # Memory
    Fault("filled", "value_based.py", "self.filled.fill_(self.size)", "self.filled.fill_(n)", "test_value_based.py -k memory"),
    Fault("filled-place", "value_based.py", "self.filled.fill_(self.size)", "self.filled = torch.tensor(self.size)", "test_value_based.py -k memory"),
    Fault("filled-read", "value_based.py", "rows = large % self.filled", "rows = large % self.size", "test_value_based.py -k memory"),
    Fault("memory-where", "value_based.py", "x[lost:] if lost else x", "x[: n - lost] if lost else x", "test_value_based.py -k memory"),
    Fault("memory-copy", "memory.py", "            soft_update(target, policy, config.tau)\n", "", "test_train.py -k copy_follows"),
    Fault("memory-tau", "memory.py", "soft_update(target, policy, config.tau)", "soft_update(target, policy, 1.0)", "test_train.py -k copy_follows"),
    Fault("memory-start", "memory.py", "len(replay) >= config.learning_starts", "len(replay) > 0", "test_train.py -k copy_follows"),
    Fault("memory-updates", "memory.py", "for _ in range(config.updates):", "for _ in range(1):", "test_train.py -k gradient_steps"),
    Fault("dqn-target", "memory.py", 'best = target.q(batch["next_obs"]).amax(-1)', 'best = policy.q(batch["next_obs"]).amax(-1)', "test_train.py -k by_hand"),
    # PPO, what it notes and how it is held back
    Fault("metrics-after", "train.py", 'values = batch["returns"] - batch["advantages"]', 'values = policy.value(batch["obs"])', "test_train.py -k notes"),
    Fault("metrics-entropy", "train.py", "entropy=entropy, values=values)", "entropy=-now, values=values)", "test_train.py -k notes"),
    Fault("metrics-band", "train.py", "clip = dict(clip_low=low, clip_high=high) if low < 1", "clip = dict(clip_low=low) if low < 1", "test_train.py -k range"),
    Fault("target-kl", "train.py", '["approx_kl"] > config.target_kl:', '["approx_kl"] > 1.5 * config.target_kl:', "test_train.py -k epochs_end"),
    Fault("kl-adapted", "train.py", "beta = adaptive.beta if adaptive else config.kl_coef", "beta = config.kl_coef", "test_train.py -k adapted"),
    Fault("kl-used", "train.py", "total = total + beta * masked_mean", "total = total + config.kl_coef * masked_mean", "test_train.py -k adapted"),
    Fault("kl-noted", "train.py", 'metrics["kl_coef"] = beta', 'metrics["kl_coef"] = adaptive.beta', "test_train.py -k adapted"),
    Fault("kl-band", "ppo.py", "elif kl < self.target / self.band:", "elif kl < self.target:", "test_ppo.py -k adaptive"),
    Fault("kl-bounds", "ppo.py", "self.beta = min(max(self.beta, self.bounds[0]), self.bounds[1])", "self.beta = max(self.beta, self.bounds[0])", "test_ppo.py -k adaptive"),
    Fault("value-old", "train.py", "None if config.clip_value is None else returns - advantages", "None if config.clip_value is None else returns", "test_train.py -k value_clip"),
    Fault("ppo-order", "train.py", "for part in group.minibatches(batch, config.minibatch, learner.order):\n            learner.minimise", "for part in group.minibatches(batch, config.minibatch, learner.generator):\n            learner.minimise", "test_train.py -k order"),
    Fault("ppo-norm", "train.py", 'learner.minimise("loss", loss, config.max_grad_norm, **live, **part)', 'learner.minimise("loss", loss, **live, **part)', "test_train.py -k longest"),
    Fault("trpo-norm", "train.py", 'learner.minimise("error", error, config.max_grad_norm, **part)', 'learner.minimise("error", error, **part)', "test_train.py -k longest"),
    Fault("memory-norm", "memory.py", "limit = config.max_grad_norm", "limit = float('inf')", "test_train.py -k longest"),
    Fault("scale-gamma", "train.py", "RewardScale(self.n_envs, self.gamma)", "RewardScale(self.n_envs, self.lam)", "test_train.py -k scale"),
    Fault("preset-trpo", "train.py", "dict(trpo=_FAST,", "dict(trpo=_AS_IT_IS,", "test_train.py -k preset"),
    Fault("preset-tensors", "train.py", '    **{(method, "po_book/CartPole-v1"): known for method, known in _CARTPOLE.items()},\n', "", "test_train.py -k preset"),
    # Policies' numbers, spaces
    Fault("epsilon-kept", "policies.py", 'self.register_buffer("epsilon", one, persistent=False)', 'self.register_buffer("epsilon", one)', "test_policies.py"),
    Fault("epsilon-type", "policies.py", "one = torch.tensor(1.0, dtype=torch.float32)", "one = torch.tensor(1.0)", "test_policies.py"),
    Fault("sigma-start", "policies.py", "sigma = torch.tensor(0.2, dtype=torch.float32)", "sigma = torch.tensor(0.1, dtype=torch.float32)", "test_policies.py"),
    Fault("space-mask", "spaces.py", "            return slice(start, start + flatdim(part))\n", "            return slice(0, flatdim(part))\n", "test_spaces.py"),
    Fault("space-mask-unused", "spaces.py", "    policy.mask = mask\n", "", "test_spaces.py"),
    Fault("space-start", "spaces.py", "return np.ravel(sizes), np.ravel(space.start)", "return np.ravel(sizes), 0 * np.ravel(sizes)", "test_spaces.py"),
    Fault("space-image", "spaces.py", "space.dtype == np.uint8 and len(space.shape) == 3", "len(space.shape) == 3", "test_spaces.py"),
    Fault("space-bounds", "spaces.py", "*rest, _bounds(space))", "*rest)", "test_spaces.py"),
    Fault("space-order", "spaces.py", "np.stack([space.low, space.high])", "np.stack([space.low, -space.low])", "test_spaces.py"),
    Fault("tensor-start", "tensor_env.py", "(lambda actions: actions + start) if start else", "(lambda actions: actions) if start else", "test_tensor_env.py -k protocol"),
    Fault("tensor-clamp", "tensor_env.py", "actions.reshape(-1, *space.shape).clamp(low, high)", "actions.reshape(-1, *space.shape)", "test_tensor_env.py -k clipped"),
    Fault("cartpole-first", "tensor_env.py", "state = torch.where(done[:, None], first, final)", "state = torch.where(terminated[:, None], first, final)", "test_tensor_env.py -k balanced"),
    # Checkpoints and folders
    Fault("sync-file", "checkpoint.py", "    os.fsync(file.fileno())\n", "", "test_checkpoint.py"),
    Fault("sync-folder", "checkpoint.py", "        os.fsync(folder)\n", "", "test_checkpoint.py"),
    Fault("read-back", "checkpoint.py", "        load_checkpoint(part)\n", "", "test_checkpoint.py"),
    Fault("checksum", "checkpoint.py", '.hexdigest() != digest:', '.hexdigest() == "":', "test_checkpoint.py"),
    Fault("code-in-file", "checkpoint.py", "weights_only=True", "weights_only=False", "test_checkpoint.py"),
    Fault("part-stays", "checkpoint.py", "            _remove(part)", "            pass", "test_checkpoint.py"),
    Fault("full-unsaid", "checkpoint.py", 'hint = ": the disk is full, make room" if full else ""', 'hint = ""', "test_checkpoint.py"),
    Fault("full-torch", "checkpoint.py", "for said in error, error.__context__:", "for said in (error,):", "test_checkpoint.py"),
    Fault("full-asked", "checkpoint.py", "file.write(bytes(2**20))", "file.write(bytes(1))", "test_train_lm.py -k disk"),
    Fault("folder-swap", "checkpoint.py", "            if part.is_dir():  # no call of the system swaps folders\n                _remove(path)\n", "", "test_checkpoint.py"),
    Fault("folder-early", "checkpoint.py", "            write(part)\n            if part", "            _remove(path)\n            write(part)\n            if part", "test_checkpoint.py"),
    Fault("folder-half", "checkpoint.py", "    with suppress(OSError):  # half a folder of a process that was killed\n        _remove(part)\n", "", "test_train_lm.py -k saved"),
    Fault("lock-hint", "checkpoint.py", 'said = f"{error.strerror}: {hint}"', "said = error.strerror", "test_checkpoint.py"),
    Fault("asked-twice", "checkpoint.py", "    if path.exists():\n        hint", "    if False:\n        hint", "test_checkpoint.py"),
    Fault("asked-free", "checkpoint.py", "same = name in free or held", "same = held", "test_checkpoint.py"),
    Fault("asked-flat", "checkpoint.py", 'flat |= _flat(x, f"{of}{name}.") if', "flat |= _flat(x, of) if", "test_checkpoint.py"),
    Fault("lock-shared", "checkpoint.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "test_checkpoint.py"),
    Fault("lock-errors", "checkpoint.py", "return error.errno not in (errno.EACCES, errno.EAGAIN)", "return False", "test_checkpoint.py"),
    Fault("lock-stays", "checkpoint.py", "                path.unlink()", "                pass", "test_checkpoint.py"),
    Fault("lock-removed", "checkpoint.py", "if os.path.samestat(os.fstat(file.fileno()), path.stat()):", "if True:", "test_checkpoint.py"),
    Fault("lock-pid", "checkpoint.py", "file.truncate(0)\n", "pass\n", "test_checkpoint.py"),
    Fault("capture-alias", "checkpoint.py", "if id(x) in numbers and type(x) is not tuple:", "if False:", "test_checkpoint.py"),
    Fault("table-newline", "checkpoint.py", 'lineterminator="\\n"', 'lineterminator="\\r\\n"', "test_checkpoint.py"),
    # The loop
    Fault("remaining", "runner.py", "left = 1 - before / config.total_steps", "left = 1.0", "test_train.py -k left"),
    Fault("seconds", "runner.py", '+ (run.log[-1]["seconds"] if run.log else 0)', "", "test_runner.py -k counts_transitions"),
    Fault("valid-steps", "runner.py", "new = valid.numel() if rollout.complete else int(valid.sum())", "new = valid.numel()", "test_runner.py -k hundred"),
    Fault("crossed", "runner.py", "after // every > before // every", "after // every >= before // every", "test_runner.py -k multiple"),
    Fault("hundred", "algorithm.py", "deque(maxlen=100)", "deque(maxlen=10)", "test_runner.py -k hundred"),
    Fault("generator-seed", "algorithm.py", "torch.Generator(device).manual_seed(seeds[use])", "torch.Generator(device).manual_seed(0)", "test_seeds.py"),
    Fault("adam-eps", "algorithm.py", "eps=1e-5, fused", "eps=1e-8, fused", "test_learner.py"),
    Fault("observe-all", "runner.py", "run.policy.observe(rollout.transitions(\"obs\"))", "run.policy.observe(rollout.obs.flatten(0, 1))", "test_runner.py -k normalised"),
    Fault("solved", "runner.py", '.get("mean_return", -inf) >= bar', '.get("mean_return", -inf) > bar', "test_runner.py -k good_enough"),
    # Methods
    Fault("clip-pace", "train.py", "return self.clip * pace, high * pace", "return self.clip, high", "test_train.py -k quarter or range"),
    Fault("lr-pace", "train.py", "learner.set_lr(config.lr * pace)", "learner.set_lr(config.lr)", "test_train.py -k rate_each"),
    Fault("grad-norm", "train.py", 'learner.minimise("loss", loss, config.max_grad_norm, **batch)', 'learner.minimise("loss", loss, **batch)', "test_train.py -k longest"),
    Fault("a2c-entropy", "train.py", 'total - config.entropy_coef * mean["entropy"]', 'total + config.entropy_coef * mean["entropy"]', "test_train.py -k first_step"),
    Fault("a2c-value", "train.py", 'mean["policy_loss"] + config.value_coef * mean["value_loss"]', 'mean["policy_loss"] + mean["value_loss"]', "test_train.py -k first_step"),
    Fault("dqn-epsilon", "memory.py", "max(config.epsilon, 1 - explored * (1 - config.epsilon))", "1.0", "test_train.py -k exploration"),
    Fault("dqn-lr", "memory.py", "    learner.set_lr(config.lr * remaining)\n", "", "test_train.py -k rate_each"),
    Fault("ddpg-sigma", "memory.py", "learner.set(sigma=1.0 if fresh else config.sigma)", "learner.set(sigma=1.0)", "test_train.py -k exploration"),
    Fault("ddpg-critic", "memory.py", "    policy.critic.requires_grad_(False)\n", "", "test_train.py -k own_end"),
    Fault("memory-valid", "memory.py", "rollout.transitions(name) for", "getattr(rollout, name).flatten(0, 1) for", "test_train.py -k memory_holds"),
    # Many machines
    Fault("room-of-all", "processes.py", "me, end, late = uuid4().hex,", 'me, end, late = "room",', "test_processes.py -k dead"),
    Fault("room-late", "processes.py", 'f"process {_list(late)} of {size} did not come"', 'f"process {_list(late[:1])} of {size} did not come"', "test_processes.py -k come"),
    Fault("ring-part", "processes.py", "parts[(rank - k - 1) % size] +=", "parts[(rank - k - 1) % size] =", "test_processes.py -k ring"),
    Fault("ring-sum", "processes.py", "ring_sum(gradient(x), wire) / wire.size", "ring_sum(gradient(x), wire)", "test_processes.py -k ring"),
    Fault("server-sum", "processes.py", "torch.stack(gradients).mean(0)", "torch.stack(gradients).sum(0)", "test_processes.py -k ring"),
    Fault("wire-bytes", "processes.py", "self.sent += x.numel() * x.element_size()", "self.sent += x.numel()", "test_processes.py -k ring"),
    Fault("silent-nobody", "processes.py", 'left = [r for r in left if not self.store.check([f"noticed/{r}"])]', "left = []", "test_processes.py -k hangs"),
    Fault("rows-own", "distributed.py", "f(every, *how, **kwargs)[self.rank]", "f(every, *how, **kwargs)[0]", "test_distributed.py -k rows_of_all"),
    Fault("mean-of-means", "distributed.py", "count = torch.as_tensor(rows, dtype", "count = torch.as_tensor(1, dtype", "test_distributed.py -k averages"),
    Fault("moments-between", "distributed.py", "(squares + n * (means - mean) ** 2)", "squares", "test_distributed.py -k averages"),
    Fault("parts-kept", "distributed.py", 'if "mask" in batch else self.valid', 'if "mask" in batch else torch.ones_like(self.valid)', "test_distributed.py -k minibatches"),
    Fault("parts-others", "distributed.py", "own := rows[rows >= 0]", "own := rows[rows != 0]", "test_distributed.py -k minibatches"),
    Fault("mine-first", "distributed.py", "x[:, self.rank * self.n_envs :][:, : self.n_envs]", "x[:, : self.n_envs]", "test_distributed.py -k one_with_all"),
    Fault("shared-unclipped", "distributed.py", "        self.bound(max_grad_norm)\n", "", "test_distributed.py -k one_with_all"),
    Fault("starts-alike", "distributed.py", "seed + (0 if alike else", "seed + (0 if True else", "test_distributed.py -k one_with_all"),
    Fault("weights-of-first", "distributed.py", "    learner.group.call(dist.broadcast, learner.weights.data, 0)\n", "", "test_distributed.py -k sends"),
    Fault("images-sent", "distributed.py", "image = rollout.obs.dtype == torch.uint8", "image = False", "test_distributed.py -k images"),
    Fault("together-alike", "distributed.py", "require(x == want, name", "require(True, name", "test_distributed.py -k refused"),
    Fault("together-again", "distributed.py", "return any(again) and left[0]", "return again[0] and left[0]", "test_distributed.py -k started_again"),
    Fault("stepper-of-first", "distributed.py", '{"stepper": parts[self.rank]}', '{"stepper": parts[0]}', "test_distributed.py -k killed"),
    Fault("all-evaluate", "runner.py", "if learner.group.first and _crossed", "if not learner.group.first and _crossed", "test_distributed.py -k grades"),
    Fault("stop-alone", "runner.py", "stop = group.agree(_stops(report if group.first else None, run, learner))", "stop = _stops(report if group.first else None, run, learner)", "test_distributed.py -k early"),
    Fault("delay-bound", "asynchronous.py", "math.pi / (2 * (2 * delay + 1))", "math.pi / (2 * (2 * delay + 2))", "test_asynchronous.py -k bound"),
    Fault("staleness-own", "asynchronous.py", "return int(self.updates) - 1 - seen", "return int(self.updates) - seen", "test_asynchronous.py -k rmsprop"),
    Fault("rmsprop-after", "asynchronous.py", "self.squares.lerp_(gradient**2, 0.01)", "self.squares.lerp_(gradient.abs(), 0.01)", "test_asynchronous.py -k rmsprop"),
    Fault("worker-seeds", "asynchronous.py", 'spawn_seed(seed, "starts", worker)', 'spawn_seed(seed, "starts")', "test_asynchronous.py"),
    # Teams
    Fault("team-mean", "team_env.py", "float(sum(rewards)) / len(rewards)", "float(sum(rewards))", "test_team_env.py"),
    Fault("team-order", "team_env.py", "dict(zip(self.names, moves))", "dict(zip(self.names[::-1], moves))", "test_team_env.py"),
    Fault("team-ends", "team_env.py", "reward, all(terminated), any(truncated)", "reward, any(ended), any(truncated)", "test_team_env.py"),
    Fault("meeting-walls", "team_env.py", "np.array([x > 0, True, x < last], np.int8)", "np.array([True, True, True], np.int8)", "test_team_env.py"),
    Fault("shown-order", "multi_agent.py", "for i in reversed(order):", "for i in order:", "test_multi_agent.py -k advantages"),
    Fault("who-asks", "multi_agent.py", "ids = self.ids.expand(", "ids = (0 * self.ids).expand(", "test_multi_agent.py"),
    Fault("critic-own", "multi_agent.py", "        if central:\n", "        if False:\n", "test_multi_agent.py"),
    Fault("team-mask", "multi_agent.py", "    policy.mask = mask\n", "    policy.mask = None\n", "test_multi_agent.py"),
    Fault("happo-factor", "multi_agent.py", "factor = factor * ratio(logp, old)[:, [agent]]", "factor = ratio(logp, old)[:, [agent]]", "test_multi_agent.py"),
    Fault("happo-mine", "multi_agent.py", '"mask": valid & mine', '"mask": valid', "test_multi_agent.py"),
    Fault("turn-others", "multi_agent.py", "others = (owners >= 0) & (owners != agent)", "others = owners == -2", "test_multi_agent.py"),
    Fault("turn-adam", "multi_agent.py", 'return same | {"weights": weights.data}', 'return {"weights": weights.data}', "test_multi_agent.py"),
    # Runs, figures
    Fault("spread-mean", "figures.py", "np.median(runs, axis=0)", "np.mean(runs, axis=0)", "test_figures.py"),
    Fault("spread-shade", "figures.py", "low, high, color = runs.min(0), runs.max(0)", "low, high, color = *np.quantile(runs, [0.25, 0.75], axis=0)", "test_figures.py"),
    Fault("curves-grid", "figures.py", "first, last = max(x[0] for x, _ in curves), min(", "first, last = min(x[0] for x, _ in curves), max(", "test_figures.py"),
    Fault("record-empty", "figures.py", "        if row[key]:\n", "        if row[key] != 'x':\n", "test_figures.py"),
    Fault("record-last", "figures.py", '.setdefault(row["variant"], {})[row["seed"]] = row', '.setdefault(row["variant"], {}).setdefault(row["seed"], row)', "test_figures.py"),
    Fault("facts-seed", "runs.py", 'if k not in ("seed", "is")}', 'if k != "is"}', "test_cli.py -k plot or line or legend"),
    Fault("facts-kind", "runs.py", "fits = isinstance(asked[name], kind)", "fits = True", "test_cli.py -k fact"),
    Fault("grade-order", "runs.py", '_GRADES = "mean_return", "success", "return", "reward"', '_GRADES = "return", "reward", "mean_return", "success"', "test_cli.py -k grade"),
    Fault("events-purge", "runs.py", "SummaryWriter(out, purge_step=step)", "SummaryWriter(out)", "test_cli.py -k events"),
    Fault("wandb-step", "runs.py", "run.log(numbers, step=int(row[clock(row)]))", "run.log(numbers, step=0)", "test_cli.py -k biases"),
    Fault("logger-first", "runs.py", "for logger in filter(None, loggers):", "for logger in filter(None, loggers[:1]):", "test_cli.py -k logger"),
    Fault("film-seed", "runs.py", "        how = seed, deterministic, max_steps\n", "        how = 0, deterministic, max_steps\n", "test_cli.py -k video or film"),
    Fault("film-likely", "runs.py", "        how = seed, deterministic, max_steps\n", "        how = seed, False, max_steps\n", "test_cli.py -k film"),
    Fault("film-bound", "runs.py", "        how = seed, deterministic, max_steps\n", "        how = seed, deterministic\n", "test_cli.py -k without_an_end"),
    Fault("film-first", "runs.py", "        self.frames.clear()\n        self._keep()\n", "        self.frames.clear()\n", "test_cli.py -k video or film"),
    Fault("film-restart", "runs.py", "        self.frames.clear()\n", "", "test_cli.py -k video or film"),
    Fault("film-last", "runs.py", '"append_images": frames[1:]', '"append_images": frames[1:-1]', "test_cli.py -k video or film"),
    # Language models
    Fault("lm-lock", "train_lm.py", "stack.enter_context(lock_folder(out))", "stack.enter_context(lock_folder(None))", "test_train_lm.py -k trainer"),
    Fault("lm-lock-late", "train_lm.py", "    with _owned(learner.accelerator, out), learning(", "    with _owned(learner.accelerator, None), learning(", "test_train_lm.py -k trainer"),
    Fault("lm-lock-all", "train_lm.py", "        for_all(accelerator, lambda: stack.enter_context(lock_folder(out)))\n", "        stack.enter_context(lock_folder(out))\n", "test_train_lm.py -k two_processes"),
    Fault("lm-tell", "lm_batch.py", "    broadcast_object_list(failed)\n", "", "test_train_lm.py -k refused"),
    Fault("lm-same", "train_lm.py", "        check_asked(out, facts, _FREE)\n", "        pass\n", "test_train_lm.py -k resumed"),
    Fault("lm-same-task", "train_lm.py", "problems = type(task).__name__ if plain else str(task)", 'problems = ""', "test_train_lm.py -k resumed"),
    Fault("lm-same-free", "train_lm.py", "check_asked(out, facts, _FREE)", "check_asked(out, facts, ())", "test_train_lm.py -k differ"),
    Fault("lm-part", "lm_learner.py", "    finally:\n        if accelerator.is_main_process:\n            shutil.rmtree(part, ignore_errors=True)\n", "    finally:\n        pass\n", "test_train_lm.py -k disk"),
    Fault("lm-early", "lm_learner.py", "        shutil.rmtree(part, ignore_errors=True)\n    accelerator.wait_for_everyone()\n", "        shutil.rmtree(part, ignore_errors=True)\n        for old in out.glob('checkpoint-*'):\n            shutil.rmtree(old)\n    accelerator.wait_for_everyone()\n", "test_train_lm.py -k disk"),
    Fault("lm-disk", "lm_learner.py", "        with explain_disk(done):\n", "        if True:\n", "test_train_lm.py -k disk"),
    Fault("lm-model-half", "lm_learner.py", "    replace_file(folder, write)\n", "    write(folder)\n", "test_train_lm.py -k model"),
    Fault("lm-damaged", "lm_learner.py", "    except (RuntimeError, ValueError, EOFError, UnpicklingError) as error:", "    except ZeroDivisionError as error:", "test_train_lm.py -k damaged"),
    Fault("lm-whole", "lm_learner.py", "        check_whole(**counts, **pauses)\n", "        check_whole(**counts)\n", "test_train_lm.py -k sense"),
    Fault("lm-lr", "lm_learner.py", '        check_in("(0, inf)", lr=self.lr)\n', "", "test_train_lm.py -k sense"),
    Fault("lm-norm", "lm_learner.py", "check_positive(**counts, lr=self.lr, max_grad_norm=self.max_grad_norm)", "check_positive(**counts, lr=self.lr)", "test_train_lm.py -k sense"),
    Fault("batch-whole", "lm_batch.py", "        check_whole(**counts, **or_none)\n", "", "test_train_lm.py -k sense"),
    Fault("batch-temperature", "lm_batch.py", '        check_in("(0, inf)", temperature=self.temperature)\n', "        check_positive(temperature=self.temperature)\n", "test_train_lm.py -k sense"),
    Fault("sft-mean", "tasks.py", "return -logp.sum() / part.mask.sum()", "return -logp.mean()", "test_tasks.py"),
    Fault("sft-rows", "tasks.py", "return -logp.sum() / part.mask.sum()", "return -(logp.sum(1) / part.mask.sum(1)).mean()", "test_tasks.py"),
    Fault("sft-end", "tasks.py", "answers = [[*answer, tokenizer.eos_token_id] for answer in answers]", "pass", "test_tasks.py"),
    Fault("data-sign", "data.py", r'(?<![\w)\]}%])', "", "test_data.py"),
    Fault("data-comma", "data.py", r'(?!\d)|\d+)(?:', r'|\d+)(?:', "test_data.py"),
    Fault("data-first", "data.py", "found[-1][\"top\"]", "found[0][\"top\"]", "test_data.py"),
    Fault("data-minus", "data.py", "return -size if found[-1][\"minus\"] else size", "return size", "test_data.py"),
    Fault("data-box", "data.py", "last = max(last, (opened.pop(), brace.start()))", "last = (opened.pop(), brace.start())", "test_data.py"),
    Fault("data-escape", "data.py", r'|\\.|[{}]', "|[{}]", "test_data.py"),
    Fault("data-hashes", "data.py", "text.rpartition(\"####\")", "text.partition(\"####\")", "test_data.py"),
    Fault("data-nothing", "data.py", "value is not None and last_number(completion) == value", "last_number(completion) == value", "test_data.py"),
    Fault("data-empty", "data.py", "normalized(answer) != \"\"", "normalized(answer)", "test_data.py"),
    Fault("data-nfkc", "data.py", "\"NFC\"", "\"NFKC\"", "test_data.py"),
    Fault("data-bom", "data.py", "\"utf-8-sig\" if i == 1 else \"utf-8\"", "\"utf-8\"", "test_data.py"),
    Fault("data-lines", "data.py", r'Path(path).read_bytes().split(b"\n")', "[x.encode() for x in Path(path).read_text('utf-8').splitlines()]", "test_data.py"),
    Fault("data-number", "data.py", "enumerate(Path(path).read_bytes()", "enumerate(Path(path).read_bytes().strip()", "test_data.py"),
    Fault("data-split1", "data.py", "held_out = data.get(\"test\") if held_out is None else held_out", "held_out = held_out", "test_data.py"),
    Fault("data-split2", "data.py", "held_out = data.get(\"test\") if held_out is None else held_out", "held_out = data.get('test', held_out)", "test_data.py"),
    Fault("data-blank", "data.py", "return bool(x.strip())", "return bool(x)", "test_data.py"),
    Fault("data-content", "data.py", "all(isinstance(text, str) for text in said)", "True", "test_data.py"),
    Fault("data-leak", "data.py", "for key in [key for key in others if key in known]:", "for key in []:", "test_data.py"),
    Fault("data-self", "data.py", "right = x is not None and same(x, x)", "right = x is not None", "test_data.py"),
    Fault("data-bare", "data.py", "if all(x is None for x in found.values()):", "if False:", "test_data.py"),
    Fault("data-mixed", "data.py", "if all(x is None for x in found.values()):", "if any(x is None for x in found.values()):", "test_data.py"),
    Fault("data-epoch", "data.py", "part[_order(len(part), seed, epoch)[i]]", "part[_order(len(part), seed, 0)[i]]", "test_data.py"),
    Fault("data-seed", "data.py", "part[_order(len(part), seed, epoch)[i]]", "part[_order(len(part), 0, epoch)[i]]", "test_data.py"),
    Fault("data-order", "data.py", "part[_order(len(part), seed, epoch)[i]]", "part[i]", "test_data.py"),
    Fault("data-keys", "data.py", "json.dumps(prompt, sort_keys=True)", "json.dumps(prompt)", "test_data.py"),
    Fault("data-extract", "data.py", "return said is not None and bool(self.same(said", "return bool(self.same(completion", "test_data.py"),
    Fault("data-taken", "data.py", "require(not names & taken", "require(True", "test_data.py"),
    Fault("data-gold", "data.py", "return verify(read, said)", "return verify(said, said)", "test_data.py"),
    Fault("data-formula", "data.py", "parse(text if marked else f\"${text}$\")", "parse(text)", "test_data.py"),
    Fault("tasks-stream", "tasks.py", "(start + i) * world + rank", "(start + i) * world", "test_tasks.py"),
    Fault("tasks-rank", "tasks.py", "(start + i) * world + rank", "start + i + rank", "test_tasks.py"),
    Fault("tasks-spawn", "tasks.py", "spawn(seed, place).generate", "spawn(seed + place, 0).generate", "test_tasks.py"),
    Fault("tasks-grads", "tasks.py", "optimizer.zero_grad()  # whatever the caller has left there", "pass", "test_tasks.py"),
    Fault("tasks-left", "tasks.py", "        optimizer.step()\n        optimizer.zero_grad()\n", "        optimizer.step()\n", "test_tasks.py"),
    Fault("tasks-mode", "tasks.py", "with evaluating(model):", "if True:", "test_tasks.py"),
    Fault("evaluating-kept", "pretrained.py", "            part.training = True\n", "            pass\n", "test_pretrained.py test_tasks.py test_sampling.py"),
    Fault("evaluating-never", "pretrained.py", "        part.training = False\n", "        pass\n", "test_pretrained.py test_tasks.py test_sampling.py"),
    Fault("tasks-spread", "tasks.py", "statistics.variance(failed) / problems", "statistics.pvariance(failed) / problems", "test_tasks.py"),
    Fault("tasks-clustered", "tasks.py", "statistics.variance(failed) / problems", "statistics.variance(failed) / right.numel()", "test_tasks.py"),
    Fault("tasks-parts", "tasks.py", '"at_once": at_once}', '"at_once": 0}', "test_tasks.py"),
    Fault("tasks-law", "tasks.py", "sampling |= {", "sampling = {", "test_tasks.py"),
    Fault("tasks-rows", "tasks.py", ".view(-1, samples)", ".view(samples, -1).T", "test_tasks.py"),
    Fault("tasks-half", "tasks.py", "how = samples, max_new_tokens, generator, at_once", "how = samples, max_new_tokens, generator, 0", "test_tasks.py"),
    Fault("score-state", "reward_models.py", "hidden[torch.arange(len(rows)), last]", "hidden[torch.arange(len(rows)), last - 1]", "test_reward_models.py -k score"),
    Fault("sum-pairs", "rewards.py", "for w, x in zip(weights, row) if x is not None]", "for w, x in zip(weights, [x for x in row if x is not None])]", "test_rewards.py -k sum"),
    Fault("lm-pace", "train_lm.py", "pace *= 1 - (step - 1) / config.steps", "pace *= 1 - step / config.steps", "test_train_lm.py -k rate_rises"),
    Fault("lm-warmup", "train_lm.py", "pace = min(1, step / (config.warmup + 1))", "pace = min(1, step / config.warmup)", "test_train_lm.py -k rate_rises"),
    Fault("lm-held-out", "train_lm.py", "prompts = learner.task.prompts(config.eval_prompts, seed=run.seed, held_out=True)", "prompts = learner.task.prompts(config.eval_prompts, seed=run.seed)", "test_train_lm.py -k held_out"),
    Fault("lm-drop", "lm_step.py", "drop_truncated(mask, samples.finished)", "drop_truncated(mask, ~samples.finished)", "test_train_lm.py -k finished"),
    # Divergences, rewards of tokens, groups, objectives, a batch
    Fault("kl-support", "kl.py", "torch.where(p > 0, logp - logq, 0)", "(logp - logq)", "test_kl.py"),
    Fault("kl-law", "kl.py", "p = logp.exp()", "p = logq.exp()", "test_kl.py"),
    Fault("kl-order", "kl.py", "_ESTIMATORS[kind](logp_ref - logp)", "_ESTIMATORS[kind](logp - logp_ref)", "test_kl.py"),
    Fault("kl-stale-k2", "kl.py", '(rho.detach() if kind == "k2" else rho) * estimate', "rho * estimate", "test_kl.py"),
    Fault("kl-stale-fixed", "kl.py", '(rho.detach() if kind == "k2" else rho) * estimate', "rho.detach() * estimate", "test_kl.py"),
    Fault("kl-stale-never", "kl.py", "if logp_old is None:", "if True:", "test_kl.py"),
    Fault("kl-data", "kl.py", "    check_detached(logp_ref=logp_ref)\n", "", "test_kl.py"),
    Fault("half-cut", "ppo.py", "cut = min(MAX_LOG_RATIO, root)", "cut = MAX_LOG_RATIO", "test_ppo.py -k half"),
    Fault("half-cut-all", "ppo.py", "cut = min(MAX_LOG_RATIO, root)", "cut = root", "test_ppo.py -k ratio"),
    Fault("mean-empty", "ppo.py", "torch.where(count > 0, x.sum() / count.clamp(min=1), empty)", "x.sum() / count.clamp(min=1)", "test_ppo.py -k mask"),
    Fault("explained-empty", "ppo.py", "masked_mean((x - masked_mean(x, mask)) ** 2, mask, math.nan)", "masked_mean((x - masked_mean(x, mask)) ** 2, mask)", "test_ppo.py -k mask"),
    Fault("rlhf-last", "rlhf.py", "mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)", "mask & ~nn.functional.pad(mask[:, 1:], (0, 1))", "test_rlhf.py"),
    Fault("rlhf-pays", "rlhf.py", "- beta * log_ratio", "+ beta * log_ratio", "test_rlhf.py"),
    Fault("rlhf-outside", "rlhf.py", '(log_ratio,) = keep(mask, kl_estimate(logp, logp_ref, "k1"))', 'log_ratio = kl_estimate(logp, logp_ref, "k1")', "test_rlhf.py"),
    Fault("rlhf-each", "rlhf.py", "torch.where(last, rewards[:, None], 0)", "torch.where(mask, rewards[:, None], 0)", "test_rlhf.py"),
    Fault("rlhf-next", "rlhf.py", "following = nn.functional.pad(values[:, 1:], (0, 1))", "following = nn.functional.pad(values[:, :-1], (1, 0))", "test_rlhf.py"),
    Fault("rlhf-rates", "rlhf.py", "gae(*by_time, gamma, lam)", "gae(*by_time, lam, gamma)", "test_rlhf.py"),
    Fault("rlhf-gaps", "rlhf.py", "if ((mask & ~end)[:, :-1] & ~mask[:, 1:]).any():", "if False:", "test_rlhf.py"),
    Fault("rlhf-temperature", "rlhf.py", "token_logprobs(reference, ids, mask, temperature, attention_mask=real)", "token_logprobs(reference, ids, mask, attention_mask=real)", "test_rlhf.py"),
    Fault("rlhf-values", "rlhf.py", "(values,) = keep(mask, critic(ids, real))", "values = critic(ids, real)", "test_rlhf.py"),
    Fault("rlhf-returns", "rlhf.py", '"returns": advantages + values', '"returns": advantages', "test_rlhf.py"),
    Fault("rlhf-beta", "rlhf.py", "kl_rewards(rewards, logp, logp_ref, mask, beta)", "kl_rewards(rewards, logp, logp_ref, mask, 0.1)", "test_rlhf.py"),
    Fault("rlhf-gamma", "rlhf.py", "token_gae(token_rewards, values, mask, gamma, lam)", "token_gae(token_rewards, values, mask, lam=lam)", "test_rlhf.py"),
    Fault("rlhf-lam", "rlhf.py", "token_gae(token_rewards, values, mask, gamma, lam)", "token_gae(token_rewards, values, mask, gamma)", "test_rlhf.py"),
    Fault("rlhf-ratio", "rlhf.py", '"log_ratio": logp - logp_ref', '"log_ratio": logp_ref - logp', "test_rlhf.py"),
    Fault("held-twice", "rlhf.py", "if key not in owner]", "if True]", "test_rlhf.py"),
    Fault("held-trainable", "rlhf.py", "sum(p.numel() for p in new if p.requires_grad)", "sum(p.numel() for p in new)", "test_rlhf.py"),
    Fault("held-first", "rlhf.py", "owner = {key: name for key in held} | owner", "owner = owner | {key: name for key in held}", "test_rlhf.py"),
    Fault("group-one", "grpo.py", "rewards.shape[1] > 1", "rewards.shape[1] > 0", "test_grpo.py"),
    Fault("group-ints", "grpo.py", '    require(rewards.is_floating_point(), "rewards", "floats", rewards.dtype)\n', "", "test_grpo.py"),
    Fault("group-equal", "grpo.py", "torch.where(equal, 0, rewards - rewards.mean(1, keepdim=True))", "rewards - rewards.mean(1, keepdim=True)", "test_grpo.py"),
    Fault("group-eps", "grpo.py", "centred / (std + eps)", "centred / std.clamp(min=eps)", "test_grpo.py"),
    Fault("group-eps-default", "grpo.py", "# what divides\n    eps: float = 1e-6, ", "# what divides\n    eps: float = 1e-4, ", "test_grpo.py"),
    Fault("group-measured", "grpo.py", 'measured = centred if scale == "advantage" else rewards', "measured = rewards", "test_grpo.py"),
    Fault("group-sample", "grpo.py", "measured.std(over, correction=0, keepdim=True)", "measured.std(over, correction=1, keepdim=True)", "test_grpo.py"),
    Fault("grpo-high", "grpo.py", "clipped_surrogate(logp, logp_old, advantages, clip_low, clip_high)", "clipped_surrogate(logp, logp_old, advantages, clip_low)", "test_grpo.py"),
    Fault("grpo-kind", "grpo.py", 'kl_estimate(logp, logp_ref, "k3", sampler)', 'kl_estimate(logp, logp_ref, "k2", sampler)', "test_grpo.py"),
    Fault("grpo-stale", "grpo.py", "    sampler = logp_old if corrected else None\n", "    sampler = None\n", "test_grpo.py"),
    Fault("grpo-stale-log", "grpo.py", "now, sampler = logp.detach(), logp_old if corrected else None", "now, sampler = logp.detach(), None", "test_grpo.py"),
    Fault("grpo-policy-loss", "grpo.py", 'metrics["policy_loss"] = -(weights * surrogate).sum()', 'metrics["policy_loss"] = -(weights * objective.detach()).sum()', "test_grpo.py"),
    Fault("grpo-fraction", "grpo.py", "outside_band(now, logp_old, **clip)", "outside_band(now, logp_old)", "test_grpo.py"),
    Fault("grpo-empty", "grpo.py", "masked_mean(x, mask, nan)", "masked_mean(x, mask)", "test_grpo.py"),
    Fault("grpo-outside", "grpo.py", "return (weights * keep(mask, x)[0]).sum()", "return (weights * x).sum()", "test_grpo.py"),
    Fault("weights-rows", "grpo.py", "return ones / mask.sum().clamp(min=1)", "return ones / mask.sum(1, keepdim=True).clamp(min=1)", "test_grpo.py"),
    Fault("weights-constant", "grpo.py", "return ones / (len(mask) * max_len)", "return ones / max_len", "test_grpo.py"),
    Fault("weights-empty-row", "grpo.py", "return ones / (len(mask) * mask.sum(1, keepdim=True)", "return ones / (mask.any(1).sum().clamp(min=1) * mask.sum(1, keepdim=True)", "test_grpo.py"),
    Fault("process-before", "grpo.py", ".flip(1).cumsum(1).flip(1)", ".cumsum(1)", "test_grpo.py"),
    Fault("process-sample", "grpo.py", "steps.std(correction=0), eps", "steps.std(), eps", "test_grpo.py"),
    Fault("process-eps", "grpo.py", "# true at the last token of each step\n    group_size: int,                # completions $G$ of each prompt, in adjacent rows\n    eps: float = 1e-6", "# true at the last token of each step\n    group_size: int,                # completions $G$ of each prompt, in adjacent rows\n    eps: float = 1e-2", "test_grpo.py"),
    Fault("fill-last", "dapo.py", "Filled(groups[:size], torch.cat(kept)[:size], drawn, draws)", "Filled(groups[-size:], torch.cat(kept)[-size:], drawn, draws)", "test_dapo.py"),
    Fault("fill-missing", "dapo.py", "wanted = -(-missing * drawn // len(groups)) if groups else size", "wanted = missing", "test_dapo.py"),
    Fault("fill-more", "dapo.py", "_asked(draw, min(wanted, size))", "_asked(draw, wanted)", "test_dapo.py"),
    Fault("fill-drawn", "dapo.py", "            drawn = len(groups) + len(dead)\n            return", "            return", "test_dapo.py"),
    Fault("fill-draws", "dapo.py", "for draws in range(1, max_draws + 1):", "for draws in range(1, max_draws + 2):", "test_dapo.py"),
    Fault("fill-rows", "dapo.py", "len(groups) != n or len(rewards) != n", "len(groups) != n", "test_dapo.py"),
    Fault("signal-words", "dapo.py", "dead.count(min(seen)), dead.count(max(seen))", "dead.count(max(seen)), dead.count(min(seen))", "test_dapo.py"),
    Fault("signal-equal", "dapo.py", "if min(seen) == max(seen):", "if False:", "test_dapo.py"),
    Fault("informative-near", "dapo.py", "return (rewards != rewards[:, :1]).any(-1)", "return rewards.std(-1) > 1e-3", "test_dapo.py"),
    Fault("informative-two", "dapo.py", "return (rewards != rewards[:, :1]).any(-1)", "return rewards[:, 0] != rewards[:, -1]", "test_dapo.py"),
    Fault("overlong-floor", "dapo.py", ".clamp(-1, 0)", ".clamp(max=0)", "test_dapo.py"),
    Fault("overlong-whole", "dapo.py", "    check_whole(cache=cache, max_len=max_len)\n", "", "test_dapo.py"),
    Fault("upweight-mean", "dapo.py", "share = keep.to(advantages.dtype).mean()", "share = keep.to(advantages.dtype).mean().sqrt()", "test_dapo.py"),
    Fault("totals-adjacent", "objective.py", "rewards.sum(1).view(-1, group_size)", "rewards.sum(1).view(group_size, -1).T", "test_objective.py"),
    Fault("choice-returns", "objective.py", "token_gae(rewards, nothing, mask, self.gamma, 1.0)", "token_gae(rewards, nothing, mask, 1.0, 1.0)", "test_objective.py"),
    Fault("choice-lam", "objective.py", "token_gae(rewards, values, mask, self.gamma, self.lam)", "token_gae(rewards, values, mask, self.gamma, 0.95)", "test_objective.py"),
    Fault("choice-targets", "objective.py", "targets = advantages + values * mask", "targets = advantages + values", "test_objective.py"),
    Fault("choice-normal", "objective.py", "        if self.normalize:\n", "        if True:\n", "test_objective.py"),
    Fault("choice-scale", "objective.py", "group_advantages(totals, self.scale)", "group_advantages(totals)", "test_objective.py"),
    Fault("choice-high", "objective.py", "clipped_surrogate(logp, logp_old, advantages, self.low, self.high)", "clipped_surrogate(logp, logp_old, advantages, self.low)", "test_objective.py"),
    Fault("choice-penalty", "objective.py", "kl_penalty(logp, logp_old, advantages, self.beta)", "kl_penalty(logp, logp_old, advantages, 1.0)", "test_objective.py"),
    Fault("choice-radius", "objective.py", "return ratio(logp, logp_old) * advantages", "return logp * advantages", "test_objective.py"),
    Fault("choice-stale", "objective.py", "        sampler = logp_old if self.kl.corrected else None\n", "        sampler = None\n", "test_objective.py"),
    Fault("choice-kind", "objective.py", "kl_estimate(logp, logp_ref, self.kl.kind, sampler)", 'kl_estimate(logp, logp_ref, "k3", sampler)', "test_objective.py"),
    Fault("choice-price", "objective.py", "kl_rewards(rewards, logp, logp_ref, mask, self.kl.in_reward)", "kl_rewards(rewards, logp, logp_ref, mask, 0.05)", "test_objective.py"),
    Fault("choice-weight", "objective.py", "return gain - self.kl.in_loss * price", "return gain - 0.04 * price", "test_objective.py"),
    Fault("length-one", "objective.py", 'if self.aggregation != Aggregation("constant"):', 'if self.aggregation.how != "constant":', "test_objective.py"),
    Fault("length-lost", "objective.py", 'aggregation=Aggregation("constant", max_len)', 'aggregation=Aggregation("constant", 1)', "test_objective.py"),
    Fault("weights-given", "objective.py", "    if weights is None:\n", "    if True:\n", "test_objective.py"),
    Fault("weights-dtype", "objective.py", "objective.aggregation(mask, logp.dtype)", "objective.aggregation(mask)", "test_objective.py"),
    Fault("loss-band", "objective.py", "clip = objective.trust.low, objective.trust.high", "clip = objective.trust.low, None", "test_objective.py"),
    Fault("loss-kind", "objective.py", 'kl_estimate(now, logp_ref, "k3", sampler)', 'kl_estimate(now, logp_ref, "k1", sampler)', "test_objective.py"),
    Fault("loss-stale-log", "objective.py", "logp_old if objective.kl.corrected else None", "None", "test_objective.py"),
    Fault("loss-empty", "objective.py", "masked_mean(x, mask, torch.nan)", "masked_mean(x, mask)", "test_objective.py"),
    Fault("preset-discount", "objective.py", '"a2c": Objective(Critic(0.99)', '"a2c": Objective(Critic(1.0)', "test_objective.py"),
    Fault("preset-sum", "objective.py", "LeaveOneOut(), OneStep(), InReward(), _SUM", "LeaveOneOut(), OneStep(), InReward(), _TOKENS", "test_objective.py"),
    Fault("preset-magistral", "objective.py", 'Group("advantage", True), Clip', 'Group("batch", True), Clip', "test_objective.py"),
    Fault("preset-beta", "objective.py", "beta: float = 0.04  # weight of a nat", "beta: float = 0.05  # weight of a nat", "test_objective.py"),
    Fault("words-change", "objective.py", "if a.words != b.words else (repr(a), repr(b))", "", "test_objective.py"),
    Fault("facts-entropy", "lm_batch.py", '"entropy": -(samples.logps.sum() / tokens)', '"entropy": -(samples.logps.mean())', "test_lm_batch.py"),
    Fault("facts-length", "lm_batch.py", '"length": samples.mask.sum(1).double().mean()', '"length": samples.attention_mask.sum(1).double().mean()', "test_lm_batch.py"),
    Fault("facts-truncated", "lm_batch.py", '"truncated": 1 - samples.finished', '"truncated": samples.finished', "test_lm_batch.py"),
    Fault("facts-reward", "lm_batch.py", '"reward": self.rewards.mean()', '"reward": self.verdicts.mean()', "test_lm_batch.py"),
    Fault("paid-penalty", "lm_batch.py", "verdicts + soft_overlong", "verdicts - soft_overlong", "test_lm_answers.py"),
    Fault("paid-columns", "lm_batch.py", "task.columns(asked)", "task.columns(prompts)", "test_lm_batch.py"),
    Fault("draw-verdicts", "lm_batch.py", "return answers.groups(), answers.verdicts", "return answers.groups(), answers.rewards", "test_lm_batch.py"),
    Fault("draw-live", "lm_batch.py", "dead = _dead(torch.cat([answers.verdicts for answers in seen]))", "dead = 1 - len(filled.groups) / filled.drawn", "test_lm_answers.py"),
    Fault("live-always", "lm_step.py", 'if "targets" in batch or objective.kl.in_loss:', 'if "targets" in batch:', "test_lm_answers.py"),
    Fault("live-critic", "lm_step.py", 'if "targets" in batch or objective.kl.in_loss:', "if objective.kl.in_loss:", "test_lm_answers.py"),
    Fault("live-first", "lm_step.py", "    live[0] = True  # a step has a loss, if only of zeros\n", "", "test_lm_answers.py"),
    Fault("live-group", "lm_step.py", ".any(1).view(-1, group_size).any(1)", ".any(1).view(-1, group_size).all(1)", "test_lm_answers.py"),
    Fault("dtype-discounts", "off_policy.py", "torch.arange(rewards.shape[-1], dtype=rewards.dtype, device=rewards.device)", "torch.arange(rewards.shape[-1], device=rewards.device)", "test_dtypes.py"),
    Fault("dtype-sum", "policy_gradient.py", "(~done).view(torch.uint8).to(x.dtype).mul_(factor)", "(~done).view(torch.uint8).to(torch.get_default_dtype()).mul_(factor)", "test_dtypes.py"),
    Fault("dtype-band", "ppo.py", ".to(rho.dtype)", ".float()", "test_dtypes.py"),
    Fault("dtype-aggregate", "grpo.py", "token_weights(mask, how, max_len, x.dtype)", "token_weights(mask, how, max_len)", "test_dtypes.py"),
    Fault("dtype-grpo", "grpo.py", "token_weights(mask, aggregate, max_len, logp.dtype)", "token_weights(mask, aggregate, max_len)", "test_dtypes.py"),
    Fault("dtype-share", "dapo.py", "share = keep.to(advantages.dtype).mean()", "share = keep.to(torch.get_default_dtype()).mean()[None]", "test_dtypes.py"),
    Fault("dtype-average", "distributed.py", "torch.as_tensor(rows, dtype=x.dtype, device=x.device)", "torch.as_tensor(float(rows), device=x.device)", "test_dtypes.py"),
    Fault("dtype-noise", "off_policy.py", "torch.empty_like(actions).normal_(generator=generator)", "torch.randn(actions.shape, generator=generator)", "test_dtypes.py"),
    Fault("dtype-motion", "tensor_env.py", "20 * actions.to(state.dtype) - 10", "20 * actions.to(torch.get_default_dtype()) - 10", "test_dtypes.py"),
    Fault("dtype-potential", "reward_models.py", "potentials.new_tensor([outcome])", "torch.tensor([outcome])", "test_dtypes.py"),
    Fault("dtype-draw", "mdp.py", "generator=generator, dtype=p.dtype)", "generator=generator)", "test_dtypes.py"),
    Fault("dtype-solve", "mdp.py", "return torch.linalg.solve(torch.eye(len(r)).double() - gamma * P, r)", "return torch.linalg.solve(torch.eye(len(r)).double() - gamma * P, r).to(torch.get_default_dtype())", "test_dtypes.py"),
    # Command line
    Fault("teach-seed", "lm_job.py", "model = tiny_lm(tokenizer, seed=seed)", "model = tiny_lm(tokenizer)", "test_cli.py -k tiny"),
    Fault("teach-order", "lm_job.py", "torch.Generator().manual_seed(seed)\n    model", "torch.Generator()\n    model", "test_cli.py -k tiny"),
    Fault("teach-problems", "lm_job.py", "prompts = task.prompts(20_000, seed)", "prompts = task.prompts(20_000)", "test_cli.py -k tiny"),
    Fault("teach-lock", "lm_job.py", "with lock_folder(out):", "with lock_folder(None):", "test_cli.py -k taught"),
    Fault("grade-seed", "cli.py", "returns = run.evaluate(n, seed, **how)", "returns = run.evaluate(n, **how)", "test_cli.py -k evaluate"),
    Fault("grade-how", "cli.py", "returns = run.evaluate(n, seed, **how)", "returns = run.evaluate(n, seed)", "test_cli.py -k evaluate"),
    Fault("grade-likely", "runner.py", "episodes, seed, deterministic, max_steps)", "episodes, seed, False, max_steps)", "test_cli.py -k evaluate"),
    Fault("grade-bound", "runner.py", "episodes, seed, deterministic, max_steps)", "episodes, seed, deterministic)", "test_cli.py -k episode"),
    Fault("video-how", "cli.py", "self.video, self.seed, **how)", "self.video, self.seed)", "test_cli.py -k film"),
    Fault("teach-half", "lm_job.py", "    save_lm(out, model, tokenizer)\n", "    model.save_pretrained(out)\n    tokenizer.save_pretrained(out)\n", "test_cli.py -k taught"),
    Fault("grade-held-out", "lm_job.py", "prompts = task.prompts(n, seed, held_out=True)", "prompts = task.prompts(n, seed)", "test_cli.py -k evaluate"),
    Fault("summary-error", "cli.py", "(scores.var(correction=0) / (n - 1)).sqrt()", "(scores.var(correction=0) / n).sqrt()", "test_cli.py -k evaluate"),
    Fault("exit-code", "cli.py", "return _fail(130,", "return _fail(1,", "test_cli.py -k interrupted"),
    Fault("encoding", "cli.py", 'stream.reconfigure(errors="replace")', "pass", "test_cli.py -k stream"),
    Fault("place-slash", "cli.py", '.replace("/", "-")', "", "test_cli.py -k slash"),
    Fault("read-objective", "lm_job.py", "choices[name] = _read(type(getattr(preset, name)), values, path)", "choices[name] = getattr(preset, name)", "test_cli.py -k preset"),
    # A pretrained model, a step, a learner
    Fault("load-auto", "pretrained.py", "dtype: torch.dtype | str = torch.float32,", 'dtype: torch.dtype | str = "auto",', "test_pretrained.py"),
    Fault("load-frozen", "pretrained.py", "is_trainable=True", "is_trainable=False", "test_pretrained.py"),
    Fault("load-train", "pretrained.py", "model = model.to(device).eval()", "model = model.to(device)", "test_pretrained.py test_language_model.py"),
    Fault("load-side", "pretrained.py", ', padding_side="left")', ")", "test_pretrained.py test_language_model.py"),
    Fault("load-adapters", "pretrained.py", 'if not Path(name_or_path, "adapter_config.json").is_file():', "if True:", "test_pretrained.py"),
    Fault("masters-adapters", "pretrained.py", "p.data.to(torch.promote_types(p.dtype, torch.float32))", "p.data", "test_pretrained.py"),
    Fault("masters-whole", "pretrained.py", "        model.float()\n", "        pass\n", "test_pretrained.py"),
    Fault("masters-double", "pretrained.py", "any(p.dtype in _HALF for p in model.parameters())", "True", "test_pretrained.py"),
    Fault("masters-all", "pretrained.py", "if is_peft(model) or getattr", "if getattr", "test_pretrained.py"),
    Fault("masters-half", "pretrained.py", "_HALF = torch.float16, torch.bfloat16", "_HALF = (torch.bfloat16,)", "test_pretrained.py test_lm_learner.py"),
    Fault("learning-marks", "pretrained.py", "                vars(layer).update(state)\n", "                vars(layer).update(training=False)\n", "test_pretrained.py"),
    Fault("learning-never", "pretrained.py", "if recompute or x.gradient_checkpointing]", "if recompute and x.gradient_checkpointing]", "test_pretrained.py"),
    Fault("learning-theirs", "pretrained.py", "if recompute or x.gradient_checkpointing]", "if recompute]", "test_pretrained.py"),
    Fault("learning-dropout", "pretrained.py", "            setattr(layer, name, 0.0)\n", "            pass\n", "test_pretrained.py"),
    Fault("learning-whole", "pretrained.py", "    layer.training = layer.gradient_checkpointing = True\n", "    layer.train()\n    layer.gradient_checkpointing = True\n", "test_pretrained.py"),
    Fault("reference-learns", "pretrained.py", ".eval().requires_grad_(False)", ".eval()", "test_pretrained.py"),
    Fault("reference-same", "pretrained.py", "    return copy.deepcopy(model).eval()", "    return copy.copy(model).eval()", "test_pretrained.py test_lm_learner.py"),
    Fault("reference-adapted", "pretrained.py", "        return model.disable_adapter()\n", "        return nullcontext()\n", "test_pretrained.py"),
    Fault("adapters-prompt", "pretrained.py", "is_peft(model) and model.active_peft_config.is_prompt_learning", "False", "test_pretrained.py"),
    Fault("adapters-injected", "pretrained.py", 'getattr(model, "_hf_peft_config_loaded", False)', "False", "test_pretrained.py"),
    Fault("recomputes", "language_model.py", " or shared == 0 or _recomputes(model):", " or shared == 0:", "test_pretrained.py"),
    Fault("recomputes-idle", "language_model.py", "return any(layer.training for layer in marked)", "return any(True for layer in marked)", "test_lm_learner.py test_pretrained.py"),
    Fault("vocabulary-head", "language_model.py", "(states)[..., :vocabulary]", "(states)", "test_lm_learner.py test_language_model.py test_sampling.py"),
    Fault("trunk-adapters", "language_model.py", "(model if inside is None else inside()).base_model", "model.base_model", "test_pretrained.py"),
    Fault("part-sort", "lm_step.py", "(last - first).sort(stable=True)", "(last - first).sort(stable=True, descending=True)", "test_lm_batch.py"),
    Fault("part-prompts", "lm_step.py", "stop - start < prompts:", "stop - start <= prompts:", "test_lm_batch.py"),
    Fault("part-tokens", "lm_step.py", "(stop + 1 - start) * size * widths[stop] > tokens", "(stop - start) * size * widths[stop] > tokens", "test_lm_batch.py"),
    Fault("part-rows", "lm_step.py", "(stop + 1 - start) * size * widths[stop] > tokens", "(stop + 1 - start) * widths[stop] > tokens", "test_lm_batch.py"),
    Fault("part-alone", "lm_step.py", "rows = shared = next(fits, 1)", "rows = shared = size", "test_lm_batch.py"),
    Fault("part-small", "lm_step.py", "range(size, 0, -1)", "range(1, size + 1)", "test_lm_batch.py"),
    Fault("part-edge", "lm_step.py", "n * widths[start] <= tokens", "n * widths[start] < tokens", "test_lm_batch.py"),
    Fault("part-columns", "lm_step.py", "return first, length - real.flip(-1).int().argmax(-1)", "return 0 * first, length - real.flip(-1).int().argmax(-1)", "test_lm_batch.py"),
    Fault("parts-place", "lm_step.py", "every[part.index, part.columns] = x", "every[: len(x), part.columns] = x", "test_lm_batch.py"),
    Fault("old-sampler", "lm_step.py", "logp = samples.logps if policy is None else scored(policy)", "logp = samples.logps", "test_lm_batch.py"),
    Fault("ref-adapters", "lm_step.py", "        with as_reference(reference):\n            columns", "        if True:\n            columns", "test_lm_learner.py"),
    Fault("step-skip", "lm_step.py", "{} if skipped else", "", "test_lm_batch.py"),
    Fault("step-skipped", "lm_step.py", "skipped = accelerator.optimizer_step_was_skipped", "skipped = False", "test_lm_batch.py"),
    Fault("step-mean", "lm_step.py", "{name: x / tokens for name, x in total.items()} if tokens else {}", "{name: x / tokens for name, x in total.items()}", "test_lm_learner.py -k masked"),
    Fault("step-share", "lm_step.py", "torch.where(tokens > 0, x * tokens, 0)", "x * tokens", "test_lm_batch.py test_train_lm.py"),
    Fault("step-sum", "lm_step.py", "_add_up(total, metrics, part.rows[\"mask\"].sum())", "_add_up(total, metrics, part.rows[\"mask\"].any())", "test_lm_batch.py"),
    Fault("scoring-warm", "lm_batch.py", 'return {"temperature": self.temperature, "vocabulary"', 'return {"temperature": 1.0, "vocabulary"', "test_lm_batch.py test_train_lm.py"),
    Fault("cuts-never", "lm_batch.py", "return (self.top_k, self.top_p, self.min_p) != (None, None, None)", "return (self.top_k, self.top_p) != (None, None)", "test_lm_batch.py"),
    Fault("grade-ids", "lm_batch.py", "completion_ids=[row[keep].tolist() for row, keep in zip(ids, kept)]", "completion_ids=ids.tolist()", "test_lm_batch.py"),
    Fault("grade-ended", "lm_batch.py", "finished=samples.finished.tolist()", "finished=(~samples.finished).tolist()", "test_lm_batch.py"),
    Fault("grade-messages", "lm_batch.py", 'return [[{"role": "assistant", "content": text}] for text in texts]', "return texts", "test_lm_batch.py"),
    Fault("told-all", "lm_batch.py", "**_told(seen)", "**_told(seen[:0])", "test_lm_batch.py"),
    Fault("group-extras", "lm_batch.py", "self.told.rows_from(i * size, size)", "self.told.rows_from(0, size)", "test_lm_batch.py"),
    Fault("alone-wrong", "lm_batch.py", "given, failed = None, error", "raise", "test_train_lm.py -k fails_in_one"),
    Fault("device-kept", "lm_learner.py", "        AcceleratorState._reset_state(reset_partial_state=True)\n", "        pass\n", "test_lm_learner.py"),
    Fault("precision-launcher", "lm_learner.py", 'precision = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")', 'precision = precision or "no"', "test_lm_learner.py"),
    Fault("precision-cpu", "lm_learner.py", 'require(place.type == "cuda", "precision"', 'require(True, "precision"', "test_lm_learner.py"),
    Fault("sharded", "lm_learner.py", 'for name in "FSDP", "DEEPSPEED", "MEGATRON_LM":', 'for name in ("FSDP",):', "test_lm_learner.py"),
    Fault("several-device", "lm_learner.py", 'own = str(device) in ("auto", "cpu", "cuda")', "own = True", "test_lm_learner.py"),
    Fault("tiny-rate", "lm_learner.py", "LMConfig(**tiny | {\"lr\": 1e-4} | changes)", "LMConfig(**tiny | changes)", "test_lm_learner.py"),
    Fault("adapter-rate", "lm_learner.py", '**({"lr": 1e-5} if is_peft(model) else {})', "", "test_lm_learner.py"),
    Fault("large-config", "lm_learner.py", "< 10_000_000:", "< 1_000_000_000:", "test_lm_learner.py"),
    Fault("old-gradients", "lm_learner.py", "    model.zero_grad()\n", "", "test_lm_learner.py"),
    Fault("masters-never", "lm_learner.py", "model = float32_masters(model).to(place)", "model = model.to(place)", "test_lm_learner.py"),
    Fault("rank-seeds", "lm_learner.py", "spawn_seed(seed, use, rank) for use in", "spawn_seed(seed, use) for use in", "test_lm_learner.py"),
    Fault("same-seeds", "lm_learner.py", 'for use in ("actions", "minibatches")', 'for use in ("actions", "actions")', "test_lm_learner.py"),
    Fault("frozen-saved", "lm_learner.py", "                state.pop(name, None)\n", "                pass\n", "test_lm_learner.py"),
    Fault("frozen-tied", "lm_learner.py", "model.named_parameters(remove_duplicate=False)", "model.named_parameters()", "test_lm_learner.py"),
    Fault("reset-saved", "lm_learner.py", "if reset and learner.reference is not None:", "if learner.reference is not None:", "test_lm_learner.py"),
    Fault("reset-adapters", "lm_learner.py", "fixed = reference is model and config.reset_reference", "fixed = False", "test_lm_learner.py"),
    Fault("reference-idle", "pretrained.py", "if is_peft(model) and _is_idle(model):", "if is_peft(model):", "test_pretrained.py"),
    Fault("reference-learns-too", "pretrained.py", "if learns and is_peft(model):", "if is_peft(model):", "test_pretrained.py"),
    Fault("own-asked", "lm_learner.py", '    learner.asked = own["asked"]\n', "", "test_lm_learner.py"),
    Fault("own-order", "lm_learner.py", '    learner.order.set_state(own["order"])\n', "", "test_lm_learner.py"),
    Fault("generate-lost", "lm_learner.py", "            setattr(settings, name, None)\n", "            pass\n", "test_lm_learner.py"),
    Fault("generate-kept", "lm_learner.py", "            setattr(settings, name, x)\n", "            pass\n", "test_lm_learner.py"),
    Fault("run-dropout", "train_lm.py", "learning(learner.networks, config.recompute)", "learning(learner.networks.policy.lm_head)", "test_lm_learner.py"),
    Fault("run-recompute", "train_lm.py", "learning(learner.networks, config.recompute)", "learning(learner.networks)", "test_lm_learner.py"),
    Fault("run-vocabulary", "train_lm.py", "vocabulary=config.vocabulary or len(tokenizer))", "vocabulary=config.vocabulary)", "test_lm_learner.py"),
    Fault("run-again", "train_lm.py", "again = run.config.cuts or learner.accelerator.mixed_precision", "again = learner.accelerator.mixed_precision", "test_train_lm.py test_lm_learner.py"),
    Fault("run-law", "train_lm.py", "config.max_new_tokens, **config.law, generator=learner.generator,", "config.max_new_tokens, generator=learner.generator,", "test_train_lm.py test_lm_learner.py"),
    Fault("run-stop", "train_lm.py", "            stop=config.stop, at_once=config.sample_batch,\n        )\n    state", "        )\n    state", "test_train_lm.py test_lm_learner.py"),
    Fault("score-law", "train_lm.py", "            **config.law, stop=config.stop,\n        )\n    success", "        )\n    success", "test_train_lm.py test_lm_learner.py"),
    Fault("run-state", "train_lm.py", "global_step=len(run.log)", "global_step=learner.asked", "test_train_lm.py test_lm_learner.py"),
    Fault("stop-false", "train_lm.py", "says is False", "not says", "test_lm_learner.py"),
    Fault("stop-saved", "train_lm.py", "if out is not None and (not going or done", "if out is not None and (done == config.steps or done", "test_lm_learner.py"),
    Fault("report-all", "train_lm.py", "report(run.log[-1]) if main and report is not None", "report(run.log[-1]) if report is not None", "test_train_lm.py -k two_processes"),
    Fault("log-own", "train_lm.py", "run.log.append(_of_all(learner.accelerator, row))", "run.log.append(row)", "test_train_lm.py -k two_processes"),
    Fault("log-speed", "train_lm.py", 'means["tokens_per_second"] * accelerator.num_processes', 'means["tokens_per_second"]', "test_train_lm.py -k two_processes"),
    Fault("collect-alone", "train_lm.py", "all_or_none(learner.accelerator, lambda: _collect(run, learner))", "_collect(run, learner)", "test_train_lm.py -k fails_in_one"),
    Fault("exceeds-equal", "verify.py", "if not (a > b).all():", "if not (a >= b).all():", "test_verify.py"),
    Fault("exceeds-any", "verify.py", "if not (a > b).all():", "if not (a > b).any():", "test_verify.py"),
    Fault("exceeds-mean", "verify.py", "nearest = (a - b).argmin()", "nearest = (a - b).argmax()", "test_verify.py"),
]  # fmt: skip


def copy_to(folder: Path) -> None:
    "What the tests need of the checkout."
    copied = "po_book", "tests"
    for path in ROOT.iterdir():
        if path.name in copied:
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not path.name.startswith((".", "_build")):
            (folder / path.name).symlink_to(path)


def pytest_in(folder: Path, arguments: list[str]) -> None:
    "Run these tests of a copy, in silence, in a process of their own."
    os.setsid()  # so that what the tests start can be ended with them
    os.chdir(folder)
    os.environ.update(PYTHONPATH=str(folder), OMP_NUM_THREADS="1")
    sys.path.insert(0, str(folder))
    for stream in 1, 2:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    import pytest

    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])))


def outcome(folder: Path, tests: str) -> int:
    "Exit code of pytest: 0 if all pass, 1 if one fails, 5 if there are none; -9 if it hangs."
    files, _, words = tests.partition(" -k ")
    arguments = [f"tests/{file}" for file in files.split()] + (["-k", words] if words else [])
    process = SERVER.Process(target=pytest_in, args=(folder, arguments))
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


def verdict(fault: Fault) -> str:
    "What became of a fault: noticed, SURVIVED, or why it could not be made."
    with TemporaryDirectory() as name:
        folder = Path(name)
        copy_to(folder)
        path = folder / "po_book" / fault.file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.count(fault.old) != 1:
            return f"NOT MADE: its text stands {text.count(fault.old)} times in {fault.file}"
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        code = outcome(folder, fault.tests)
        return {0: "SURVIVED", 5: "NO TESTS", -9: "noticed: it hangs"}.get(code, "noticed")


def broken(tests: str) -> bool:
    "Whether these tests fail without a fault, so that they would notice anything."
    with TemporaryDirectory() as name:
        copy_to(Path(name))
        return outcome(Path(name), tests) != 0


def choices(faults: list[Fault]) -> list[str]:
    "All tests that the faults ask for, each once."
    words: dict[str, list[str]] = {}
    for fault in faults:
        files, _, chosen = fault.tests.partition(" -k ")
        words.setdefault(files, []).append(chosen)
    return [
        f"{files} -k {' or '.join(dict.fromkeys(chosen))}" if all(chosen) else files
        for files, chosen in words.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults with one of these in name or file: a,b")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--list", action="store_true", help="only say whether each can be made")
    args = parser.parse_args()
    named = args.only.split(",")
    faults = [f for f in FAULTS if any(x in f.name or x in f.file for x in named)]
    if not faults:
        parser.error(f"no fault has {args.only!r} in its name or file")
    if args.list:
        texts = {f.file: (ROOT / "po_book" / f.file).read_text("utf-8") for f in faults}
        missing = [f for f in faults if texts[f.file].count(f.old) != 1]
        for f in missing:
            print(f"{f.file:14} {f.name:20} stands {texts[f.file].count(f.old)} times")
        print(f"{len(faults) - len(missing)} of {len(faults)} faults can be made")
        return bool(missing)
    with ThreadPoolExecutor(args.jobs) as pool:
        kinds = choices(faults)
        failing = [t for t, bad in zip(kinds, pool.map(broken, kinds)) if bad]
        if failing:
            print("fail without a fault:", *failing, sep="\n  ")
            return 2
        said: dict[str, list[str]] = {}
        for fault, what in zip(faults, pool.map(verdict, faults)):
            print(f"{fault.file:20} {fault.name:24} {what}", flush=True)
            said.setdefault(fault.file, []).append(what)
    counts = [(file, sum(x.startswith("noticed") for x in found), len(found))
              for file, found in sorted(said.items())]
    for file, noticed, made in counts:
        print(f"{file:20} {noticed} of {made}")
    noticed, made = (sum(column) for column in list(zip(*counts))[1:])
    print(f"{noticed} of {made} noticed, {noticed / made:.1%}")
    return int(noticed < WANTED * made)


if __name__ == "__main__":
    sys.exit(main())
