"""`timm-selfdistill push`: share a trained model on the Hugging Face Hub."""

import argparse
from functools import partial

from timm_selfdistill.cli.options import add_run_folder
from timm_selfdistill.escape import printable
from timm_selfdistill.hub import push_folder
from timm_selfdistill.stop import in_background


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_folder(parser)
    parser.add_argument("repo", help="the repository, as namespace/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--pr", action="store_true", help="open a pull request")
    parser.add_argument("--revision", help="branch to push to; the main branch by default")
    parser.add_argument("--message", help="what the commit says")
    parser.add_argument("--license", help="licence of the weights, by its identifier on the Hub, such as apache-2.0")


def run(arguments: argparse.Namespace) -> None:
    push = partial(
        push_folder,
        arguments.folder,
        arguments.repo,
        private=arguments.private,
        revision=arguments.revision,
        create_pr=arguments.pr,
        commit_message=arguments.message,
        license=arguments.license,
    )
    print(printable(in_background(push, "push").result()))
