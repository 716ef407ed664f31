"""`python -m landscape_ray.cli` is `landscape-ray`."""

from landscape_ray.cli.app import main

main()
