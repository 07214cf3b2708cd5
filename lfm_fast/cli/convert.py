"""`lfm-fast convert`: a model as one folder."""

from lfm_fast.cli.arguments import folder


def add(commands):
    short = "write a model (a run, a checkpoint) as one folder to load or share"
    says = "Write a model as one folder in diffusers' layout: model_index.json, transformer/ and vae/."
    parser = commands.add_parser("convert", allow_abbrev=False, help=short, description=says)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--model", required=True, help="a training run's folder, a checkpoint file or a saved folder")
    add("--autoencoder", help="'embedded', a folder or a hub name; default: the one recorded with the model")
    add("--dtype", default="fp32", choices=("fp32", "fp16", "bf16"), help="of the network's weights on disk")
    add("--output", type=folder, required=True, help="folder; a flow that is there already is replaced")


def run(args):
    import torch

    from lfm_fast.checkpoint import check_output
    from lfm_fast.pipeline import LatentFlow

    check_output(args.output)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    LatentFlow.from_pretrained(args.model, args.autoencoder).save_pretrained(args.output, dtype=dtype)
    print(f"wrote {args.output}")
