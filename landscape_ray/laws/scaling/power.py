"""Power laws in one or several variables, with and without a constant: the form that most scaling laws take.

    y = E + A x1^-alpha1 x2^-alpha2 ...

Legend: y what is measured, mostly a loss; x size, data, compute or any other axis; E what no x removes. A law that
rises with x has x^+alpha.

References:
    Hestness et al. 2017, arXiv 1712.00409 (power law with constant); Henighan et al. 2020, arXiv 2010.14701
    (L = Linf + (x0 / x)^alpha, and optimal sizes N_opt ~ C^b); Zhang et al. 2024, arXiv 2402.17193 (the product form);
    Liang et al. 2024, arXiv 2410.08184 (N_opt ~ C^.57 of diffusion transformers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from landscape_ray.laws.core.law import LOSS, Law, Variable, linear, nonlinear

X = Variable("x", "", "size, data or compute")
COMPUTE = Variable("C", "FLOPs", "training compute")


def power_law(
    variables: Variable | Sequence[Variable] = X,
    *,
    name: str = "power",
    response: Variable = LOSS,
    floor: str | None = None,
    factor: str = "A",
    exponents: Sequence[str] | None = None,
    rising: bool = False,
    title: str = "",
    reference: str = "",
    assumptions: tuple[str, ...] = (),
    scale_name: str | None = None,
) -> Law:
    """Return a power law, or a product of them, as a law of one's own variables.

    Args:
        variables: what it depends on.
        name: key of the law.
        response: what it predicts, > 0.
        floor: name of the constant, >= 0; None for none.
        factor: name of the factor.
        exponents: their names; default alpha, or alpha_x for each of several variables x.
        rising: the response grows with the variables.
        title: in a few words.
        reference: where it comes from.
        assumptions: what must hold.
        scale_name: of a law of one variable, the name of factor^(1 / exponent), the form (x0 / x)^alpha; it is derived
            with its interval.

    >>> from landscape_ray.laws.core.fit import fit
    >>> from landscape_ray.laws.core.points import Points
    >>> law = power_law(Variable("examples"), floor="E", response=Variable("error"))
    >>> examples = np.geomspace(10, 1e5, 9)
    >>> found = fit(law, Points({"examples": examples}, 0.1 + 2 * examples**-0.5), num_bootstrap=0)
    >>> {name: round(value, 6) for name, value in found.parameters.items()}
    {'E': 0.1, 'A': 2.0, 'alpha': 0.5}
    """
    axes = (variables,) if isinstance(variables, Variable) else tuple(variables)
    if exponents is None:
        exponents = ("alpha",) if len(axes) == 1 else [f"alpha_{axis.name}" for axis in axes]
    sign = 1 if rising else -1
    pairs = tuple(zip((axis.name for axis in axes), exponents, strict=True))

    def logarithm(x: Mapping[str, Any], p: Mapping[str, Any]) -> Any:
        return sign * sum(p[exponent] * np.log(x[axis]) for axis, exponent in pairs)

    def columns(x: Any, p: Mapping[str, Any]) -> tuple[Any, ...]:
        return (*((1.0,) if floor else ()), np.exp(logarithm(x, p)))

    def slopes(x: Any, p: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        term = np.exp(logarithm(x, p))
        return (*(({},) if floor else ()), {exponent: sign * np.log(x[axis]) * term for axis, exponent in pairs})

    marks = "+" if rising else "-"
    product = " ".join(f"{axis}^{marks}{exponent}" for axis, exponent in pairs)
    derived = None
    if scale_name is not None:
        key, exponent = scale_name, exponents[0]

        def derived(p: Mapping[str, Any]) -> dict[str, Any]:
            return {key: p[factor] ** (1 / p[exponent])}

    return Law(
        name=name,
        title=title or f"{response.meaning or response.name} over {', '.join(a.meaning or a.name for a in axes)}",
        formula=f"{response.name} = {f'{floor} + ' if floor else ''}{factor} {product}",
        reference=reference,
        variables=axes,
        parameters=(
            *((linear(floor, "what no growth removes"),) if floor else ()),
            linear(factor, "factor"),
            *(nonlinear(exponent, f"exponent of {axis}", 0.005, 5.0, starts=4) for axis, exponent in pairs),
        ),
        columns=columns,
        slopes=slopes,
        response=response,
        derived=derived,
        assumptions=assumptions,
    )


POWER = power_law(title="power law without a constant", reference="Hestness et al. 2017, arXiv 1712.00409")

POWER_FLOOR = power_law(
    name="power_floor",
    floor="E",
    title="power law with a constant",
    reference="Hestness et al. 2017, arXiv 1712.00409; Henighan et al. 2020, arXiv 2010.14701",
)

COMPUTE_FRONTIER = power_law(
    COMPUTE,
    name="compute_frontier",
    response=Variable("N_opt", "parameters", "compute-optimal size"),
    factor="k",
    exponents=("b",),
    rising=True,
    title="compute-optimal size over compute",
    reference="Henighan et al. 2020, arXiv 2010.14701; Liang et al. 2024, arXiv 2410.08184",
    assumptions=("every N_opt is the minimum of a bracketed IsoFLOP profile",),
)
