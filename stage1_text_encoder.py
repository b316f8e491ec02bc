"""Run stage 1: encode the prompt with the model's T5 encoder, on the CPU.

Writes stage1_embeddings.safetensors and generation_config.json (text entries only) to --output_dir.
"""

import argparse
import shlex
from typing import TYPE_CHECKING

import checkpoint
import utils
from console import ArgumentParser, Report, add_log_options, prepare_libraries, run

if TYPE_CHECKING:
    from diffusers import CogVideoXPipeline
    from transformers import T5Tokenizer


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser("Stage 1 of CogVideoX text to video: encode the prompt.")
    parser.add_argument("--prompt", required=True, help="what the video shows")
    parser.add_argument("--negative_prompt", default="", help="what the video must not show; used with guidance")
    parser.add_argument("--model_id", default=utils.MODEL_NAME, help="Hugging Face model id, or a folder")
    parser.add_argument("--output_dir", type=utils.path, default=utils.STAGE_OUTPUTS, help="where the files go")
    add_log_options(parser)
    return parser.parse_args()


def main() -> None:
    """Run stage 1."""
    arguments = parse_arguments()
    report = Report("stage1", arguments)
    embeddings_path = arguments.output_dir / utils.EMBEDDINGS
    utils.check_writable(embeddings_path)
    prepare_libraries()
    config = {
        "model_id": checkpoint.resolve_model_id(arguments.model_id),
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
    }
    max_sequence_length = checkpoint.read_config(config["model_id"], "transformer")["max_text_seq_length"]

    report.title(f"Stage 1: text encoder of {config['model_id']}")
    with report.phase("load"):
        pipeline = load_text_pipeline(config["model_id"])
        encoder = pipeline.text_encoder
        report.say(f"loaded tokenizer and text encoder: {encoder.num_parameters():,} parameters, {encoder.dtype}")

    for option in ("prompt", "negative_prompt"):
        lost = text_beyond(pipeline.tokenizer, config[option], max_sequence_length)
        if lost:
            report.warn(f"--{option} is longer than {max_sequence_length} tokens; this is cut off: «{lost}»")

    with report.phase("run"):
        import torch

        with torch.no_grad():
            embeddings = pipeline.encode_prompt(
                config["prompt"], config["negative_prompt"], max_sequence_length=max_sequence_length
            )

    with report.phase("save"):
        from safetensors.torch import save_file

        tensors = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeddings, strict=True))
        with utils.replacing(embeddings_path) as temporary:
            save_file(tensors, temporary, metadata=utils.made_from(config, utils.TEXT_ENTRIES))
        utils.write_config(arguments.output_dir, config)
    report.say(f"wrote {embeddings_path} and {utils.CONFIG}")

    for name, tensor in tensors.items():
        report.add_array(name, tensor)
    report.close(
        arguments.output_dir, shlex.join(["python", "stage2_transformer.py", "--input_dir", str(arguments.output_dir)])
    )


def load_text_pipeline(model_id: str) -> "CogVideoXPipeline":
    """Load a `CogVideoXPipeline` that has only a tokenizer and a text encoder, with weights in their stored dtype."""
    folder = checkpoint.model_folder(model_id, ["tokenizer/*", "text_encoder/*"])
    from diffusers import CogVideoXPipeline
    from transformers import T5EncoderModel, T5Tokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with checkpoint.load_errors(folder):
        tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
        text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype="auto")
    return CogVideoXPipeline(tokenizer, text_encoder, vae=None, transformer=None, scheduler=None)


def text_beyond(tokenizer: "T5Tokenizer", text: str, max_sequence_length: int) -> str:
    """Return the end of `text` that does not fit into `max_sequence_length` tokens, one of which ends every text."""
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer.decode(tokens[max_sequence_length - 1 :])


if __name__ == "__main__":
    run(main)
