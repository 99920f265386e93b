"""Command: serve a checkpoint with OpenAI's API: by vLLM, or else by transformers (serve/)."""

import os
import tempfile
from pathlib import Path

from model_preparation import interrupts
from model_preparation.command_line import CommandParser, add_dtype_flag, number, run
from model_preparation.errors import SurgeryError
from model_preparation.terminal import escaped

DESCRIPTION = """\
Serve a checkpoint of any format with OpenAI's API. The command starts the engine and waits until it answers. Then it
prints the address, the model's name and a curl command. Ctrl-C or SIGTERM ends every process that the command started.
"""

EPILOG = """\
examples:
  python serve_checkpoint.py --checkpoint ../model_checkpoints/best_4layer
  python serve_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --port 8080 --dtype bfloat16 --api_key SECRET
  python serve_checkpoint.py --checkpoint ../model_checkpoints/best_4layer --engine vllm -- --max-num-seqs 16
"""


def main() -> None:
    parser = CommandParser(description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the checkpoint's folder")
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "transformers"),
        default="auto",
        help="auto: vLLM if it is installed and can serve the checkpoint, else transformers, which answers "
        "one request at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="the address to listen on; with 0.0.0.0, other machines can connect too (default: %(default)s)",
    )
    parser.add_argument("--port", type=number(int, least=1, most=65535), default=8000, help="default: %(default)s")
    add_dtype_flag(parser, help="run in this dtype (default: the checkpoint's)")
    parser.add_argument("--api_key", metavar="KEY", help="key that clients must send (default: $VLLM_API_KEY, or none)")
    parser.add_argument("--model_name", metavar="NAME", help="the name for clients (default: the folder's name)")
    parser.add_argument("--verify", action="store_true", help="first compare every file with its digest")
    parser.add_argument("--log", type=Path, metavar="FILE", help="a file for vLLM's output (default: a new file)")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="vLLM's own flags, after --")
    args = parser.parse_args()

    from model_preparation.checkpoint.checkpoint_info import read_info
    from model_preparation.io.result_inputs import name_of
    from model_preparation.serve.choose_engine import choose_engine
    from model_preparation.serve.vllm_process import address, check_port, describe, serve_by_vllm

    checkpoint = args.checkpoint.expanduser()
    info = read_info(checkpoint)
    engine = choose_engine(args.engine, info["config"])
    if engine != "vllm" and (args.flags or args.log is not None):
        parser.error("--log and flags after -- are for vLLM, but the engine is transformers")
    check_port(args.host, args.port)
    if args.verify:
        from model_preparation.checkpoint.verify import verify

        if faults := verify(checkpoint, files_only=True).faults:
            raise SurgeryError(f"{checkpoint} is not as it was built: {faults[0]}. Copy it again, or build it again.")
    dtype = args.dtype or info["dtype"]
    name = args.model_name or name_of(checkpoint)
    api_key = args.api_key or os.environ.get("VLLM_API_KEY")

    is_ready = False

    def ready() -> None:
        nonlocal is_ready
        is_ready = True
        for line in describe(address(args.host, args.port), name, api_key):
            print(escaped(line))
        print("Ready. Ctrl-C ends the server.", flush=True)

    served = {"name": name, "host": args.host, "port": args.port, "dtype": dtype, "api_key": api_key, "ready": ready}
    print(escaped(f"Engine       {engine}, {dtype}"), flush=True)
    try:
        if engine == "vllm":
            from model_preparation.serve.hf_links import hf_folder

            folder, log = hf_folder(checkpoint), args.log or _new_log()
            print(escaped(f"Log          {log}"), flush=True)
            serve_by_vllm(folder, flags=args.flags, log=log, **served)
        else:
            from model_preparation.serve.small_server import serve_by_transformers

            serve_by_transformers(checkpoint, **served)
    except KeyboardInterrupt:
        if not is_ready:
            raise
        interrupts.forget()  # Ctrl-C is the normal end of a server
        print("\nStopped.", flush=True)


def _new_log() -> Path:
    descriptor, path = tempfile.mkstemp(prefix="serve_checkpoint-", suffix=".log")
    os.close(descriptor)
    return Path(path)


if __name__ == "__main__":
    run(main)
