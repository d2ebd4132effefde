#!/usr/bin/env bash
# Runs the commands of Markdown pages, so that the docs cannot tell of what does not work:
#
#     scripts/docs-commands.sh PAGE.md...
#
# A block fenced as ```sh is run; one fenced as ```bash is shown only (a cluster's, another machine's). Each page's
# blocks run in order in one shell, in a scratch copy of the repository, with the built vcycle in PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git ls-files --cached --others --exclude-standard -z | tar --create --null --files-from=- | tar --extract -C "$scratch"
CARGO_TARGET_DIR=$(realpath -m "${CARGO_TARGET_DIR:-target}")
export CARGO_TARGET_DIR PATH=$CARGO_TARGET_DIR/release:$PATH

for page in "$@"; do
    commands=$(awk '/^ *```/ { run = !inside && $1 == "```sh"; inside = !inside; next } run' "$page")
    echo "== the commands of $page"
    (cd "$scratch" && bash -euxo pipefail -c "$commands")
done
