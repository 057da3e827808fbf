"""Put faults into the library, one at a time, and see whether the tests notice.

    python tests/mutation.py [--only NAME] [--jobs 2] [--list]

Every fault is made in a copy; the checkout is not touched. The exit code is 0 if at least
95 % of the faults were noticed. A survivor asks for a test that looks at a value.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
WANTED = 0.95
PATIENCE = 300  # seconds; a test that hangs has noticed


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
    Fault("clip-fraction", "ppo.py", "(rho != rho.clamp(1 - low, 1 + high))", "(rho != rho.clamp(1 - low, 1 + low))", "test_ppo.py"),
    Fault("clip-low", "ppo.py", "return torch.minimum(rho * advantages, rho.clamp(1 - low, 1 + high)", "return torch.minimum(rho * advantages, rho.clamp(1 - high, 1 + high)", "test_ppo.py"),
    Fault("value-clip", "ppo.py", "return torch.maximum(error, (near - returns) ** 2) / 2", "return (near - returns) ** 2 / 2", "test_ppo.py"),
    # Policies
    Fault("gain-swapped", "policies.py", "scale = gain if last else math.sqrt(2)", "scale = math.sqrt(2) if last else gain", "test_policies.py"),
    Fault("actor-gain", "policies.py", "actor = network(obs_dim, hidden, out_dim, 0.01, generator)", "actor = network(obs_dim, hidden, out_dim, 1.0, generator)", "test_policies.py"),
    Fault("critic-seed", "policies.py", "critic = network(obs_dim, hidden, 1, 1.0, generator)", "critic = network(obs_dim, hidden, 1, 1.0)", "test_policies.py test_train.py"),
    Fault("normalizer-share", "policies.py", "share * (1 - share) * gap**2", "share * gap**2", "test_policies.py"),
    Fault("normalizer-cut", "policies.py", ".clamp(-10, 10)", ".clamp(-5, 5)", "test_policies.py"),
    Fault("gaussian-entropy", "policies.py", "entropy = (log_norm + 0.5)", "entropy = (log_norm + 1.0)", "test_policies.py"),
    Fault("gaussian-noise", "policies.py", "(mean + self.log_std.exp() * noise)", "(mean + self.log_std * noise)", "test_policies.py"),
    Fault("eval-explores", "policies.py", "self.epsilon if self.training else 0.0", "self.epsilon", "test_policies.py"),
    Fault("eval-noise", "policies.py", "sigma = self.sigma if self.training else 0.0", "sigma = self.sigma", "test_policies.py test_train.py"),
    Fault("half-width", "policies.py", "(high - low) / 2)", "(high - low))", "test_policies.py"),
    # Rollout
    Fault("action-clamp", "rollout.py", "shaped = np.clip(shaped, space.low, space.high)", "pass", "test_rollout.py"),
    Fault("action-start", "rollout.py", "return array + space.start if space.start else array", "return array", "test_rollout.py"),
    Fault("restart-valid", "rollout.py", "self.restarting = done\n        elif", "self.restarting = terminated\n        elif", "test_rollout.py"),
    Fault("final-observation", "rollout.py", "next_obs[torch.from_numpy(done)] = self._tensor(final)", "pass", "test_rollout.py"),
    Fault("critic-truncation", "batch.py", "values, next_values, ends, done, gamma, lam)", "values, next_values, done, done, gamma, lam)", "test_batch.py"),
    Fault("critic-returns", "batch.py", '"returns": advantages + values,', '"returns": advantages,', "test_batch.py"),
    Fault("evaluate-mode", "rollout.py", "policy.train(training)\n", "policy.train()\n", "test_rollout.py"),
    Fault("evaluate-rounds", "rollout.py", "first = None if returns else seed", "first = seed", "test_rollout.py"),
    Fault("returns-valid", "rollout.py", "(rollout.rewards * rollout.valid).double()", "rollout.rewards.double()", "test_rollout.py"),
    Fault("minibatch-order", "batch.py", "order = torch.randperm(rows, generator=generator, device=generator.device)", "order = torch.arange(rows)", "test_batch.py"),
    Fault("scale-valid", "batch.py", "x = torch.where(valid, rewards.double(), 0)", "x = rewards.double()", "test_batch.py"),
    Fault("scale-carried", "batch.py", "    x[0] += self.gamma * self.so_far\n", "", "test_batch.py"),
    Fault("scale-ends", "batch.py", "before = cut.roll(1, 0)", "before = cut", "test_batch.py"),
    Fault("scale-used", "train.py", "rollout = replace(rollout, rewards=rewards)", "pass", "test_train.py"),
    # Environments made of tensors
    Fault("cartpole-limit", "tensor_env.py", "max_episode_steps = 500", "max_episode_steps = 501", "test_tensor_env.py"),
    Fault("cartpole-steps", "tensor_env.py", "self.steps.masked_fill_(done, 0)", "self.steps.masked_fill_(terminated, 0)", "test_tensor_env.py"),
    Fault("cartpole-start", "tensor_env.py", "-0.05, 0.05, generator", "-0.5, 0.5, generator", "test_tensor_env.py"),
    Fault("cartpole-final", "tensor_env.py", '"final_obs": final.float()', '"final_obs": self.state.float()', "test_tensor_env.py"),
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
    Fault("remaining", "runner.py", "left = 1 - before / config.total_steps", "left = 1.0", "test_runner.py test_train.py"),
    Fault("seconds", "runner.py", '+ (run.log[-1]["seconds"] if run.log else 0)', "", "test_runner.py test_resume.py"),
    Fault("valid-steps", "runner.py", "before + int(rollout.valid.sum())", "before + rollout.valid.numel()", "test_runner.py test_train.py"),
    Fault("crossed", "runner.py", "after // every > before // every", "after // every >= before // every", "test_runner.py"),
    Fault("hundred", "runner.py", "deque(maxlen=100)", "deque(maxlen=10)", "test_runner.py"),
    Fault("generator-seed", "runner.py", "generator = torch.Generator(device).manual_seed(seed)", "generator = torch.Generator(device).manual_seed(0)", "test_runner.py test_train.py"),
    Fault("adam-eps", "runner.py", "eps=1e-5, fused", "eps=1e-8, fused", "test_runner.py test_train.py"),
    Fault("observe-all", "runner.py", "run.policy.observe(rollout.obs[rollout.valid])", "run.policy.observe(rollout.obs.flatten(0, 1))", "test_runner.py test_train.py"),
    Fault("solved", "runner.py", '.get("mean_return", -inf) >= bar', '.get("mean_return", -inf) > bar', "test_runner.py"),
    # Methods
    Fault("clip-pace", "train.py", "return self.clip * pace, high * pace", "return self.clip, high", "test_train.py"),
    Fault("lr-pace", "train.py", "learner.set_lr(config.lr * pace)", "learner.set_lr(config.lr)", "test_train.py"),
    Fault("grad-norm", "train.py", "learner.step(loss, config.max_grad_norm)\n        return metrics", "learner.step(loss)\n        return metrics", "test_train.py"),
    Fault("a2c-entropy", "train.py", 'loss - config.entropy_coef * terms["entropy"]', 'loss + config.entropy_coef * terms["entropy"]', "test_train.py"),
    Fault("a2c-value", "train.py", 'terms["policy_loss"] + config.value_coef * terms["value_loss"]', 'terms["policy_loss"] + terms["value_loss"]', "test_train.py"),
    Fault("dqn-epsilon", "memory.py", "max(config.epsilon, 1 - explored * (1 - config.epsilon))", "1.0", "test_train.py"),
    Fault("dqn-lr", "memory.py", "    learner.set_lr(config.lr * remaining)\n", "", "test_train.py"),
    Fault("ddpg-sigma", "memory.py", "learner.policy.sigma = 1.0 if fresh else config.sigma", "learner.policy.sigma = 1.0", "test_train.py"),
    Fault("ddpg-critic", "memory.py", "    policy.critic.requires_grad_(False)\n", "", "test_train.py"),
    Fault("memory-valid", "memory.py", "getattr(rollout, name)[rollout.valid] for", "getattr(rollout, name).flatten(0, 1) for", "test_train.py"),
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
    Fault("lm-lock-late", "train_lm.py", "    with _owned(learner.accelerator, out):\n        if resume:", "    with _owned(learner.accelerator, None):\n        if resume:", "test_train_lm.py -k trainer"),
    Fault("lm-lock-all", "train_lm.py", "        for_all(accelerator, lambda: stack.enter_context(lock_folder(out)))\n", "        stack.enter_context(lock_folder(out))\n", "test_train_lm.py -k two_processes"),
    Fault("lm-tell", "lm_batch.py", "    broadcast_object_list(failed)\n", "", "test_train_lm.py -k refused"),
    Fault("lm-same", "train_lm.py", "        check_asked(out, facts, _FREE)\n", "        pass\n", "test_train_lm.py -k resumed"),
    Fault("lm-same-task", "train_lm.py", "problems = str(task) if is_dataclass(task) else type(task).__name__", 'problems = ""', "test_train_lm.py -k resumed"),
    Fault("lm-same-free", "train_lm.py", '_FREE = "config.checkpoint_every", "config.micro_batch"', "_FREE = ()", "test_train_lm.py -k differ"),
    Fault("lm-part", "train_lm.py", "    finally:\n        if accelerator.is_main_process:\n            shutil.rmtree(part, ignore_errors=True)\n", "    finally:\n        pass\n", "test_train_lm.py -k disk"),
    Fault("lm-early", "train_lm.py", "    _write(run, learner, part, done)\n", "    for old in out.glob('checkpoint-*'):\n        shutil.rmtree(old)\n    _write(run, learner, part, done)\n", "test_train_lm.py -k disk"),
    Fault("lm-disk", "train_lm.py", "        with explain_disk(done):\n", "        if True:\n", "test_train_lm.py -k disk"),
    Fault("lm-model-half", "train_lm.py", "    replace_file(folder, write)\n", "    write(folder)\n", "test_train_lm.py -k model"),
    Fault("lm-damaged", "train_lm.py", "    except (RuntimeError, ValueError, EOFError, UnpicklingError) as error:", "    except ZeroDivisionError as error:", "test_train_lm.py -k damaged"),
    Fault("lm-whole", "train_lm.py", "        check_whole(**counts, **pauses)\n", "        check_whole(**counts)\n", "test_train_lm.py -k sense"),
    Fault("lm-lr", "train_lm.py", '        check_in("(0, inf)", lr=self.lr)\n', "", "test_train_lm.py -k sense"),
    Fault("lm-norm", "train_lm.py", "check_positive(**counts, lr=self.lr, max_grad_norm=self.max_grad_norm)", "check_positive(**counts, lr=self.lr)", "test_train_lm.py -k sense"),
    Fault("batch-whole", "lm_batch.py", "        check_whole(**counts, **or_none)\n", "", "test_train_lm.py -k sense"),
    Fault("batch-temperature", "lm_batch.py", '        check_in("(0, inf)", temperature=self.temperature)\n', "        check_positive(temperature=self.temperature)\n", "test_train_lm.py -k sense"),
    # Command line
    Fault("teach-seed", "cli.py", "model = tiny_lm(tokenizer, seed=seed)", "model = tiny_lm(tokenizer)", "test_cli.py -k tiny"),
    Fault("teach-order", "cli.py", "torch.Generator().manual_seed(seed)\n    model", "torch.Generator()\n    model", "test_cli.py -k tiny"),
    Fault("teach-problems", "cli.py", "prompts = task.prompts(20_000, seed)", "prompts = task.prompts(20_000)", "test_cli.py -k tiny"),
    Fault("teach-lock", "cli.py", "with lock_folder(out):", "with lock_folder(None):", "test_cli.py -k taught"),
    Fault("grade-seed", "cli.py", "returns = run.evaluate(n, seed, **how)", "returns = run.evaluate(n, **how)", "test_cli.py -k evaluate"),
    Fault("grade-how", "cli.py", "returns = run.evaluate(n, seed, **how)", "returns = run.evaluate(n, seed)", "test_cli.py -k evaluate"),
    Fault("grade-likely", "runner.py", "episodes, seed, deterministic, max_steps)", "episodes, seed, False, max_steps)", "test_cli.py -k evaluate"),
    Fault("grade-bound", "runner.py", "episodes, seed, deterministic, max_steps)", "episodes, seed, deterministic)", "test_cli.py -k episode"),
    Fault("video-how", "cli.py", "self.video, self.seed, **how)", "self.video, self.seed)", "test_cli.py -k film"),
    Fault("teach-half", "cli.py", "    save_lm(out, model, tokenizer)\n", "    model.save_pretrained(out)\n    tokenizer.save_pretrained(out)\n", "test_cli.py -k taught"),
    Fault("grade-held-out", "cli.py", "prompts = task.prompts(n, seed, held_out=True)", "prompts = task.prompts(n, seed)", "test_cli.py -k evaluate"),
    Fault("summary-error", "cli.py", "(scores.var(correction=0) / (n - 1)).sqrt()", "(scores.var(correction=0) / n).sqrt()", "test_cli.py -k evaluate"),
    Fault("exit-code", "cli.py", "return _fail(130,", "return _fail(1,", "test_cli.py -k interrupted"),
    Fault("encoding", "cli.py", 'stream.reconfigure(errors="replace")', "pass", "test_cli.py -k stream"),
    Fault("place-slash", "cli.py", '.replace("/", "-")', "", "test_cli.py -k slash"),
    Fault("read-objective", "cli.py", "choices[name] = replace(getattr(preset, name), **values)", "choices[name] = getattr(preset, name)", "test_cli.py -k preset"),
]  # fmt: skip


def copy_to(folder: Path) -> None:
    "What the tests need of the checkout."
    copied = "po_book", "tests"
    for path in ROOT.iterdir():
        if path.name in copied:
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not path.name.startswith((".", "_build")):
            (folder / path.name).symlink_to(path)


def tests_pass(folder: Path, tests: str) -> bool:
    files, _, words = tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{file}" for file in files.split()] + (["-k", words] if words else [])
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    try:
        quiet = subprocess.DEVNULL
        done = subprocess.run(command, cwd=folder, env=env, stdout=quiet, stderr=quiet, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


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
        return "SURVIVED" if tests_pass(folder, fault.tests) else "noticed"


def broken(tests: str) -> bool:
    "Whether these tests fail without a fault, so that they would notice anything."
    with TemporaryDirectory() as name:
        copy_to(Path(name))
        return not tests_pass(Path(name), tests)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name or file has this in it")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--list", action="store_true", help="only say whether each can be made")
    args = parser.parse_args()
    faults = [f for f in FAULTS if args.only in f.name or args.only in f.file]
    if args.list:
        texts = {f.file: (ROOT / "po_book" / f.file).read_text("utf-8") for f in faults}
        missing = [f for f in faults if texts[f.file].count(f.old) != 1]
        for f in missing:
            print(f"{f.file:14} {f.name:20} stands {texts[f.file].count(f.old)} times")
        print(f"{len(faults) - len(missing)} of {len(faults)} faults can be made")
        return bool(missing)
    with ThreadPoolExecutor(args.jobs) as pool:
        kinds = sorted({f.tests for f in faults})
        failing = [t for t, bad in zip(kinds, pool.map(broken, kinds)) if bad]
        if failing:
            print("fail without a fault:", *failing, sep="\n  ")
            return 2
        said = []
        for fault, what in zip(faults, pool.map(verdict, faults)):
            print(f"{fault.file:14} {fault.name:20} {what}", flush=True)
            said.append(what)
    noticed = said.count("noticed")
    print(f"{noticed} of {len(said)} noticed, {noticed / max(len(said), 1):.0%}")
    return int(noticed < WANTED * len(said))


if __name__ == "__main__":
    sys.exit(main())
