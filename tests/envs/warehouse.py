"""A small world without ALFWorld's vocabulary, for engine tests: a robot, rooms, nested boxes, lamps and doors."""

DOMAIN = """
(define (domain warehouse) ; every construct that the engine knows
 (:requirements :adl :typing)
 (:types place thing - object  crate lamp - thing  robot)
 (:constants dock - place)
 (:predicates (in ?r - robot ?p - place) (joined ?a - place ?b - place) (at ?t - thing ?p - place)
   (inside ?t - thing ?c - crate) (lit ?l - lamp) (has ?r - robot ?t - thing) (seen ?p - place) (loose ?t - thing))
 (:functions (total-cost) - number)
 (:action walk :parameters (?r - robot ?from ?to - place)
   :precondition (and (in ?r ?from) (or (joined ?from ?to) (joined ?to ?from) (= ?from ?to)))
   :effect (and (not (in ?r ?from)) (in ?r ?to) (increase (total-cost) 1)))
 (:action grab :parameters (?r - robot ?t - thing)
   :precondition (and (exists (?p - place) (and (in ?r ?p) (at ?t ?p)))
                      (not (exists (?o - thing) (has ?r ?o)))
                      (forall (?c - crate) (imply (inside ?t ?c) (loose ?c))))
   :effect (and (has ?r ?t) (forall (?p - place) (not (at ?t ?p)))
                (forall (?c - crate) (when (inside ?t ?c) (and (not (inside ?t ?c)) (not (loose ?c)))))))
 (:action drop :parameters (?r - robot ?t - thing ?p - place)
   :precondition (and (has ?r ?t) (in ?r ?p)) :effect (and (not (has ?r ?t)) (at ?t ?p)))
 (:action pack :parameters (?r - robot ?t - thing ?c - crate)
   :precondition (and (has ?r ?t) (not (= ?t ?c)) (or (exists (?p - place) (and (in ?r ?p) (at ?c ?p))) (loose ?c)))
   :effect (and (inside ?t ?c) (loose ?c) (not (has ?r ?t))
                (forall (?p - place) (when (at ?c ?p) (at ?t ?p)))))
 (:action switch :parameters (?l - lamp)
   :precondition ()
   :effect (and (when (lit ?l) (not (lit ?l))) (when (not (lit ?l)) (lit ?l))))
 (:action survey :parameters (?r - robot ?p - place)
   :precondition (and (in ?r ?p) (not (seen ?p))) :effect (seen ?p))
)
"""

PROBLEM = """
(define (problem p) (:domain warehouse)
 (:objects r2 - robot  hall attic - place  c_bar_1 c_bar_2 - crate  l_bar_1 - lamp  tin_bar_1 - thing)
 (:init (in r2 dock) (joined dock hall) (joined hall attic) (at c_bar_1 dock) (at c_bar_2 hall) (at l_bar_1 hall)
        (at tin_bar_1 dock) (inside tin_bar_1 c_bar_1) (= (total-cost) 0))
 (:goal (and (forall (?l - lamp) (lit ?l)) (exists (?c - crate) (and (inside tin_bar_1 ?c) (at ?c hall)))
             (forall (?p - place) (imply (seen ?p) (not (= ?p attic)))))))
"""

GRAMMAR = '''
# a comment
grammar :: """
  {
    "intro": [{"rhs": "  Hello.\\n\\n#here#"}],
    "here": [{"condition": "in(r:robot, p:place)",
              "rhs": "You see [{t.indefinite + ' ' + t.name | in(r:robot, p:place) & at(t:thing, p:place)}]."},
             {"rhs": "You see [{t.indefinite + ' ' + t.name | at(t:thing, to:place)}]."}],
    "list_empty": [{"rhs": "nothing"}], "list_separator": [{"rhs": ", "}], "list_last_separator": [{"rhs": ", and "}],
    "lamp": [{"condition": "lit(l:lamp)", "rhs": "on"}, {"condition": "not_lit(l:lamp)", "rhs": "off again"},
             {"rhs": "dark"}]
  }
""";
action walk { template :: "walk to {to.id}"; feedback :: "{to.id}: #here#"; }
action grab { template :: "grab {t}"; feedback :: "Got {t.definite} {t.name or t.id}."; }
action drop { template :: "drop {t}"; feedback :: "Dropped."; }
action pack { template :: "pack {t} [{c.name | loose(c:crate)}]"; feedback :: "Packed."; }
action switch { template :: "switch {l}"; feedback :: "It is #lamp#."; }
action survey { template :: "survey"; feedback :: "#view#";
  grammar :: """
    # dropped before the JSON is read
    {"view": [{"rhs": "Seen."}]}
  """;
}
'''
