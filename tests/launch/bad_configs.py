"""Configs that cannot be: files that are no config, keys, values, combinations, settings on the command line."""

from pathlib import Path

from tests.launch.bad_input import CONFIG, Case, config, files, train

LINES = CONFIG.count("\n")
"""Of tiny.toml: what is written behind it begins on the next."""


def tables(*pairs: tuple[str, int]) -> str:
    """[[data.stages]] of so many tokens a window, for so many tokens; 0: to the end."""
    return "." + "".join(f"[[data.stages]]\nseq_len = {n}\n" + (f"tokens = {t}\n" if t else "") for n, t in pairs)


def mixture(*parts: str) -> str:
    head = CONFIG.replace('fasta = "genome.fa"', 'source = "mixture"').replace(
        "n_layer = 1", "n_layer = 1\nvocab_size = 300"
    )
    return head + "".join(f"[[data.mix]]\n{part}\n" for part in parts)


TOML = [
    config(b"\xff\xfe[run]", "bad.toml", "UTF-8", "byte 0"),
    config("[run\nname = 1", "bad.toml:1", "not valid TOML"),
    config("[run]\nname = 'a", "bad.toml", "not valid TOML", "at end of document"),
    config("[train]\nsteps = 1\nsteps = 2\n", "bad.toml:3", "not valid TOML"),
    config("[train]\nsteps = 1\n[train]\n", "bad.toml:3", "not valid TOML"),
    config("[train]\nsteps = 01\n", "bad.toml:2", "not valid TOML"),
    config('[run]\nname = "a\\q"\n', "bad.toml:2", "not valid TOML"),
    config("[train]\nsteps = 10k\n", "bad.toml:2", "not valid TOML"),
    config("", "train.steps or train.tokens must be given", "data.fasta: no genome given", problems=2),
    Case(("train", "nothing.toml"), ("nothing.toml: no such config file",)),
    Case(("train", "hyenadna-tiny-1kk"), ("hyenadna-tiny-1kk", "did you mean the preset 'hyenadna-tiny-1k'")),
    Case(("train", "folder"), ("folder", "is a directory"), prepare=files(folder___a="")),
    Case(("train", "x" * 300), ("no such config file",)),
    Case(("check", "nothing.toml"), ("nothing.toml: no such config file",)),
    config('extends = "gone.toml"\n', "extends (bad.toml:1)", "gone.toml: no such"),
    config("[run]\n[train]\nsteps = 1\n[extends]\na = 1\n", "extends: must be the name", "bad.toml:4"),
    Case(
        ("train", "a.toml"), ("extends goes in a circle", "a.toml -> b.toml"),
        prepare=files(a__toml='extends = "b.toml"\n', b__toml='extends = "a.toml"\n'),
    ),
    Case(
        ("train", "a.toml"), ("optim.lr: must be a number above 0", "b.toml:2 (extended)"),
        prepare=files(a__toml='extends = "b.toml"\n', b__toml=CONFIG.replace("[run]", "[optim]\nlr = 'x'\n[run]", 1)),
    ),
]  # fmt: skip

OVERRIDES = [
    train("oops", words="'oops': an override must look like section.key=value"),
    train("optim..lr=1", words="'optim..lr=1'"),
    train("optim.lr.x=1", words=("optim.lr: must be a number above 0, got a table", "command line")),
    train("lr=1", words=("lr: unknown section", "did you mean 'optim.lr'?", "command line")),
    train("optim.lrr=1", words="optim.lrr: unknown key; did you mean 'optim.lr'? (command line)"),
    train("run.name=\udcff", words="must be UTF-8"),
    train("optim=3", words="optim: must be a table, got 3 (command line)"),
    train("train.steps=1", "train.tokens=1k", words="train.steps and train.tokens exclude each other"),
    train("optim.lrr=1", "optim.lr=x", "data.fasta=no.fa", "train.clip=-1", words=("lrr", "no.fa", "clip"), problems=4),
]

UNKNOWN = [  # one in every section, with its line
    config(f".[{section}]\nzzz = 1\n", f"{section}.zzz: unknown key", f"bad.toml:{LINES + 2}")
    for section in ("optim", "schedule", "parallel", "precision", "activation", "compile", "comm", "eval", "log")
] + [
    train(f"{section}.zzz=1", words=(f"{section}.zzz: unknown key", "command line"))
    for section in ("run", "model", "model.filter", "data", "data.synthetic", "data.recall", "train", "ckpt")
] + [
    config(".[[optim.groups]]\nmatch = '*'\nzzz = 1\n", "optim.groups[0].zzz: unknown key", f":{LINES + 3}"),
    config(".[[data.stages]]\nseq_len = 32\nzzz = 1\n", "data.stages[0].zzz: unknown key", f":{LINES + 3}"),
    config(".[paralell]\nsequence = 2\n", "paralell: unknown section; did you mean 'parallel'?", f":{LINES + 1}"),
]  # fmt: skip

VALUES = [
    train(override, words=(f"{override.partition('=')[0]}: ", "command line"))
    for override in (
        "run.seed=-1", "run.name=3", "run.device=tpu", "run.deterministic=1", "model.d_model=0", "model.n_layer=1.5",
        "model.embed_dropout=1.0", "model.filter.emb_dim=4", "model.order=1", "model.arch=gpt", "data.seq_len=0",
        "data.workers=-1", "data.rc_prob=2", "data.valid_fraction=1.0", "data.source=fastq", "data.window=slide",
        "data.recall.vocab=5", "data.files=3", "train.batch_tokens=1.5k5", "train.micro_batch=some", "train.clip=nan",
        "train.nonfinite=pray", "train.spike=maybe", "train.spike_window=10", "train.mask_rate=0", "optim.name=sgd",
        "optim.betas=[0.9]", "optim.ema=1.0", "optim.z_loss=-1", "schedule.kind=exp",
        "schedule.warmup=-1", "schedule.min_ratio=1.5", "parallel.backend=fsdp", "parallel.zero=4", "parallel.shard=0",
        "parallel.sequence=two", "precision.params=fp8", "activation.checkpoint=all", "activation.offload=yes",
        "compile.enable=on", "comm.init_timeout=0", "comm.step_timeout=soon", "ckpt.every=0", "ckpt.every=never",
        "ckpt.keep=0", "ckpt.keep_every=0", "ckpt.async=later", 'ckpt.on_signal=["SIGKILL"]', "eval.windows=none",
        "eval.every=-1", "log.every=0", "log.samples=1",
    )
]  # fmt: skip

COMBINATIONS = [
    train("train.batch_tokens=100", words=("train.batch_tokens = 100", "data.seq_len = 32", "tiny.toml:10")),
    train("parallel.replicate=3", words=("parallel.replicate = 3", "8 windows per step")),
    train("parallel.replicate=2", "train.micro_batch=3", words=("train.micro_batch = 3", "4 per replica")),
    train("parallel.backend=fsdp2", "parallel.shard=3", words=("8 windows per step", "parallel.shard")),
    train("parallel.sequence=33", words=("parallel.sequence = 33", "more ranks than tokens", "data.seq_len = 32")),
    train("data.seq_len=128", words=("data.seq_len = 128", "model.max_len = 64")),
    train("parallel.backend=deepspeed", words=("parallel.backend", "needs parallel.zero")),
    train("parallel.zero=1", words=("parallel.zero = 1", "parallel.backend = 'none'")),
    train("parallel.backend=ddp", "parallel.zero=2", words=("parallel.zero = 2", "parallel.backend = 'ddp'")),
    train("parallel.shard=2", words=("parallel.shard = 2", "parallel.backend = 'none'")),
    train("activation.offload=true", words=("activation.offload", "activation.checkpoint = 'block'")),
    train(
        "parallel.backend=deepspeed", "parallel.zero=3", "parallel.replicate=2", "precision.params=fp64", "optim.name=muon",
        "optim.ema=0.9", words=("parallel.replicate = 2", "precision.params = 'fp64'", "optim.name", "optim.ema"), problems=4,
    ),
    train("optim.muon_lr=0.1", words=("optim.muon_lr would do nothing", "optim.name = 'muon'")),
    train("schedule.decay=0.5", words=("schedule.decay would do nothing", "schedule.kind = 'wsd'")),
    train("schedule.kind=constant", "schedule.min_ratio=0.5", words=("schedule.min_ratio would do nothing", "constant")),
    train("schedule.kind=wsd", "schedule.warmup=0.9", words=("schedule.decay = 0.2", "schedule.warmup = 0.9")),
    train("schedule.kind=wsd", "schedule.warmup=500", words=("schedule.warmup and schedule.decay", "the 512 of the run")),
    train("schedule.warmup=1M", words=("schedule.warmup = 1000000 tokens", "512 tokens of the run")),
    train("run.dir=runs/{date}", words=("run.dir: only {name} is filled in", "got 'runs/{date}'")),
    train("run.name= ", words="run.name must not be empty"),
    train("run.dir=", words="run.dir must not be empty"),
    config(".[[optim.groups]]\nmatch = '*.fliter.*'\n", "'*.fliter.*' must match a parameter"),
    config(".[[optim.groups]]\nlr_scale = 2\n", "optim.groups[0].match: missing", f"bad.toml:{LINES + 1}"),
    config(tables((16, 256), (64, 0)), "data.seq_len = 32 must be data.stages[1].seq_len = 64"),
    config(tables((16, 0), (32, 0)), "data.stages[0].tokens: missing"),
    config(tables((16, 256), (32, 256)), "data.stages[1].tokens: the last stage runs to the end"),
    config(tables((16, 1024), (32, 0)), "the stages before the last have 1024 tokens", "512 of the run"),
    config(tables((24, 256), (32, 0)), "train.batch_tokens = 256", "data.stages[0].seq_len = 24"),
    config(tables((16, 256), (32, 0)) + "sequence = 33\n", "data.stages[1].sequence = 33", "more ranks than tokens"),
    config(tables((16, 256), (32, 0)) + "micro_batch = 3\n", "data.stages[1].micro_batch = 3", "8 windows per step"),
    config(mixture(), "data.mix: a mixture needs its sources"),
    config(mixture('source = "mixture"'), "data.mix[0].source = 'mixture': a mixture must not hold another"),
    config(mixture('source = "recall"', 'source = "recall"\nweight = 1e-6'), "data.mix[1].weight = 1e-06", "1/1000"),
    config(mixture('source = "recall"\nweight = 0'), "data.mix[0].weight: must be a number above 0", f":{LINES + 4}"),
    config(mixture('source = "bytes"\nfiles = []\nbed = "a.bed"'), "data.mix[0].bed would not be read"),
    train("data.source=synthetic", words=("data.fasta would not be read", "data.source = 'synthetic'")),
    train("optim.groups=[3]", words="optim.groups[0]: must be a table, got 3 (command line)"),
    train("compile.enable=true", "compile.backend=nope", words=("compile.backend", "'nope'")),
    train("model.pattern=['ssd']", words="model.pattern belongs to model.arch = 'lm'"),
]  # fmt: skip

LM = CONFIG.replace("filter = { order = 8 }", 'arch = "lm"')


def lm(key: str, *words: str, **options: object) -> Case:
    return config(LM.replace('arch = "lm"', f'arch = "lm"\n{key}'), *words, **options)


MODELS = [
    lm('pattern = ["hyna"]', "model.pattern: unknown mixer 'hyna'; did you mean 'hyena'?", "bad.toml:8"),
    lm('layers = [{ mixer = "ssdd" }]', "model.layers: unknown mixer 'ssdd'; did you mean 'ssd'?"),
    lm('pattern = ["ssd", "gla"]', "model.n_layer = 1 must be a multiple of the 2 mixers"),
    lm('pattern = ["ssd"]\nlayers = [{ mixer = "gla" }]', "model.layers and model.pattern exclude each other"),
    lm('pattern = ["ssd"]\ncausal = false', "model.causal = false: 'ssd' is causal by nature"),
    lm("num_classes = 3", "model.num_classes = 3"),
    lm("mixers = { ssd = { zzz = 1 } }", "model.mixers.ssd.zzz: unknown key", "bad.toml:8"),
    lm('pattern = ["h3"]\nmixers = { h3 = { head_dim = 5 } }', "model: ", "head_dim must divide d_model = 8; got 5"),
    train("model.d_model=1T", words=("model: must be of sizes that go together", "[model]")),
    lm("order = 3", "model.order belongs to model.arch = 'hyenadna'", "model.mixers.hyena.order"),
]


def no_home() -> None:
    Path("tiny.toml").write_text(CONFIG.replace("genome.fa", "~nobody-at-all/genome.fa"))


PATHS = [
    train("data.fasta=nowhere.fa", words=("data.fasta: no such file: 'nowhere.fa'", "command line")),
    train("data.fasta=.", words="data.fasta: is not a file: '.'"),
    train("data.fasta=genome.fa/x", words=("data.fasta: no such file", "genome.fa/x")),
    train("data.bed=nowhere.bed", words="data.bed: no such file: 'nowhere.bed'"),
    train("data.fasta=" + "x" * 300, words="data.fasta"),
    train(words=("data.fasta: must be a path", "home directory", "tiny.toml:9"), prepare=no_home),
    Case(("train", "hyenadna-tiny-1k"), ("data.fasta: no genome given",)),
]

CONFIGS = [*TOML, *OVERRIDES, *UNKNOWN, *VALUES, *COMBINATIONS, *MODELS, *PATHS]
