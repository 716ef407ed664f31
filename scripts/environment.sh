# Sourced by the scripts beside it: finds or makes the Python environment and leaves its interpreter in $PYTHON.
# usage: source scripts/environment.sh [extra]      (extra: an optional dependency group of pyproject.toml)

landscape_ray_environment() {
    local extra="${1:-}" candidate
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        PYTHON="$VIRTUAL_ENV/bin/python" # an active environment is used as it is, and completed
    else
        PYTHON="$PWD/.venv/bin/python"
        if [ ! -x "$PYTHON" ]; then
            for candidate in python3 python3.13 python3.12 python3.11 python; do
                if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                    echo "making .venv with $("$candidate" --version)"
                    "$candidate" -m venv .venv
                    break
                fi
            done
            if [ ! -x "$PYTHON" ]; then
                echo "error: Python 3.11 or newer is needed and none was found; install it and run this again" >&2
                return 2
            fi
        fi
    fi
    local stamp wanted
    stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.landscape_ray_installed${extra:+_$extra}"
    wanted="$PWD $(cat pyproject.toml scripts/constraints.txt | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing landscape_ray${extra:+ with its $extra tools} (about 2 GB; once) ..."
        "$PYTHON" -m pip install --quiet --disable-pip-version-check \
            --constraint scripts/constraints.txt --editable ".${extra:+[$extra]}"
        echo "$wanted" >"$stamp"
    fi
}

landscape_ray_environment "$@"
