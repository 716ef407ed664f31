"""Laws along other axes than size, tokens and compute, through the same interface.

    power:        y = E + A x1^-alpha1 x2^-alpha2 ...      (see landscape_ray.laws.scaling.power)
    logarithmic:  y = a + b log x
    linked:       g(y) = a + b g(x),    g probit or logit

Legend: x an axis (intrinsic dimension, fine-tuning examples, how often a concept is in the pre-training data, accuracy
in distribution), y a response (exponent, loss, accuracy, accuracy out of distribution).

References:
    Sharma and Kaplan 2020, arXiv 2004.10802 (exponent against intrinsic dimension, about 4 / d);
    Zhang et al. 2024, arXiv 2402.17193 (fine-tuning: product of powers and a constant);
    Udandarao et al. 2024, arXiv 2404.04125 (accuracy is linear in the logarithm of the frequency of a concept);
    Miller et al. 2021, arXiv 2107.04649 (accuracies in and out of distribution lie on a line after a probit).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy import special

from landscape_ray.laws.core.law import LOSS, Law, Variable, linear
from landscape_ray.laws.scaling.power import power_law

Link: TypeAlias = Literal["probit", "logit"]

LINKS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "probit": (special.ndtri, special.ndtr),
    "logit": (special.logit, special.expit),
}
"""Links and their inverses by name."""

ACCURACY = Variable("accuracy", "", "accuracy", below=1.0)


def logarithmic_law(
    variable: Variable,
    *,
    name: str,
    response: Variable = ACCURACY,
    title: str = "",
    reference: str = "",
    assumptions: tuple[str, ...] = (),
) -> Law:
    """Return y = a + b log x: every factor in x adds the same.

    >>> from landscape_ray.laws.core.fit import fit
    >>> from landscape_ray.laws.core.points import Points
    >>> law = logarithmic_law(Variable("frequency"), name="frequency")
    >>> found = fit(law, Points({"frequency": [1, 10, 100, 1e3]}, [0.1, 0.2, 0.3, 0.4]), num_bootstrap=0)
    >>> round(float(found.parameters["b"] * np.log(10)), 9)
    0.1
    """
    return Law(
        name=name,
        title=title or f"{response.meaning or response.name} over the logarithm of {variable.meaning or variable.name}",
        formula=f"{response.name} = a + b log {variable.name}",
        reference=reference,
        variables=(variable,),
        parameters=(linear("a", "value at one", free=True), linear("b", "gain per e-fold", free=True)),
        columns=lambda x, p: (1.0, np.log(x[variable.name])),
        response=response,
        space="raw",
        assumptions=assumptions,
    )


def linked_law(
    variable: Variable,
    *,
    name: str,
    response: Variable = ACCURACY,
    link: Link = "probit",
    title: str = "",
    reference: str = "",
    assumptions: tuple[str, ...] = (),
) -> Law:
    """Return g(y) = a + b g(x) for two shares, in (0, 1).

    >>> from landscape_ray.laws.core.fit import fit
    >>> from landscape_ray.laws.core.points import Points
    >>> law = linked_law(Variable("inside", below=1), name="line", link="logit")
    >>> inside = np.array([0.5, 0.6, 0.7, 0.8])
    >>> outside = special.expit(special.logit(inside) - 1)
    >>> found = fit(law, Points({"inside": inside}, outside), num_bootstrap=0)
    >>> round(found.parameters["a"], 9), round(found.parameters["b"], 9)
    (-1.0, 1.0)
    """
    forward, back = LINKS[link]
    return Law(
        name=name,
        title=title or f"{response.meaning or response.name} over {variable.meaning or variable.name}, {link} scale",
        formula=f"{link}({response.name}) = a + b {link}({variable.name})",
        reference=reference,
        variables=(dataclasses.replace(variable, below=1.0),),
        parameters=(linear("a", "offset", free=True), linear("b", "slope", free=True)),
        columns=lambda x, p: (1.0, forward(x[variable.name])),
        response=dataclasses.replace(response, below=1.0),
        space="raw",
        link=forward,
        unlink=back,
        assumptions=assumptions,
    )


DATA_DIMENSION = power_law(
    Variable("d", "", "intrinsic dimension of the data"),
    name="data_dimension",
    response=Variable("exponent", "", "exponent of a scaling law"),
    factor="c",
    exponents=("b",),
    title="exponent of a scaling law over the dimension of the data",
    reference="Sharma and Kaplan 2020, arXiv 2004.10802",
    assumptions=("d is measured the same way for all data",),
)

FINETUNING = power_law(
    (Variable("N", "parameters", "model size"), Variable("D_f", "examples", "fine-tuning examples")),
    name="finetuning",
    response=LOSS,
    floor="E",
    title="loss after fine-tuning over size and examples",
    reference="Zhang et al. 2024, arXiv 2402.17193",
    assumptions=("all models were fine-tuned by one method",),
)

CONCEPT_FREQUENCY = logarithmic_law(
    Variable("frequency", "examples", "pre-training examples of a concept"),
    name="concept_frequency",
    title="accuracy on a concept over how often it was seen",
    reference="Udandarao et al. 2024, arXiv 2404.04125",
    assumptions=("accuracies are off floor and ceiling",),
)

_INSIDE = Variable("accuracy_in", "", "accuracy in distribution")
_OUTSIDE = Variable("accuracy_out", "", "accuracy out of distribution")

ACCURACY_PROBIT = linked_law(
    _INSIDE,
    name="accuracy_probit",
    response=_OUTSIDE,
    reference="Miller et al. 2021, arXiv 2107.04649",
    assumptions=("models differ in more than one way, and the shift is the same for all",),
)

ACCURACY_LOGIT = linked_law(
    _INSIDE,
    name="accuracy_logit",
    response=_OUTSIDE,
    link="logit",
    reference="Miller et al. 2021, arXiv 2107.04649",
    assumptions=("models differ in more than one way, and the shift is the same for all",),
)
