#!/usr/bin/env bash
# Run one notebook of phase 2 headless; the propagate_*.sh scripts call this.
#
#   bash scripts/notebook.sh NAME FOLDER [papermill words]
#
# notebooks/NAME.ipynb is executed into FOLDER, where its files and pictures go too. Words for papermill:
# -p NAME VALUE sets a parameter of the notebook (its first cell lists them), -y 'NAME: [1, 2]' a list.
# Relative paths start at the repository. VENV=DIR uses the environment there (scripts/setup.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ $# -lt 2 ] || [ ! -f "notebooks/$1.ipynb" ]; then
    sed -n '2,8s/^# \{0,1\}//p' "scripts/${BASH_SOURCE[0]##*/}"
    case "${1:-}" in -h | --help) exit 0 ;; *) exit 2 ;; esac
fi
name=$1 folder=$2
shift 2

bash scripts/setup.sh
mkdir -p "$folder" || {
    echo "notebook: error: cannot make the folder $folder" >&2
    exit 2
}
"${VENV:-.venv}/bin/python" -m papermill --log-output \
    "notebooks/$name.ipynb" "$folder/$name.ipynb" "$@" -r save_path "$folder"
echo "$name: pseudo-labels, pictures and the executed notebook are in $folder"
