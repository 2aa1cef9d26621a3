// What the C border's constraint is.
#pragma once

#include "grammar/constraint.h"
#include "pocketslm.h"

struct pslm_constraint {
  pocketslm::grammar::Constraint constraint;
};
