"""Example definitions: employment in Massachusetts, from real records of the American Community Survey, 2015 to 2018.

python -m feature_jobs.apply definitions=feature_jobs.census
"""

from __future__ import annotations

from datetime import timedelta

from feature_jobs.census.transforms import AGE_BANDS, SCHOOLING_BANDS, with_bands
from feature_jobs.store import (
    Allowed,
    Entity,
    FeatureService,
    FeatureView,
    Field,
    FileSource,
    NotNull,
    Range,
    Sensitivity,
)

OWNER = "census-team"
PURPOSE = "employment_statistics"

person_entity = Entity("person", join_keys=["person_id"])
cohort_entity = Entity("cohort", join_keys=["age_band", "schooling"])


def _code(name: str, description: str, sensitivity: Sensitivity = Sensitivity.PERSONAL) -> Field:
    return Field(name, "string", sensitivity=sensitivity, categorical=True, description=description)


person = FeatureView(
    "person",
    entities=[person_entity],
    source=FileSource(
        "data/census/person_*.parquet",
        event_timestamp="surveyed_at",
        created_timestamp="published_at",
    ),
    ttl=timedelta(days=400),
    transform=with_bands,
    schema=[
        Field("AGEP", "float64", sensitivity=Sensitivity.PERSONAL, description="age in years"),
        _code("SCHL", "educational attainment, code"),
        _code("MAR", "marital status"),
        _code("RELP", "relation to the householder"),
        _code("DIS", "disability", Sensitivity.SENSITIVE),
        _code("ESP", "employment status of parents"),
        _code("CIT", "citizenship"),
        _code("MIG", "moved within a year"),
        _code("MIL", "military service"),
        _code("ANC", "ancestry", Sensitivity.SENSITIVE),
        _code("NATIVITY", "native or foreign born"),
        _code("DEAR", "hearing difficulty", Sensitivity.SENSITIVE),
        _code("DEYE", "seeing difficulty", Sensitivity.SENSITIVE),
        _code("DREM", "cognitive difficulty", Sensitivity.SENSITIVE),
        _code("SEX", "sex: 1 male, 2 female", Sensitivity.SENSITIVE),
        _code("RAC1P", "race, code", Sensitivity.SENSITIVE),
        _code("age_band", "age in bands, key of the cohort view"),
        _code("schooling", "schooling in bands, key of the cohort view"),
    ],
    checks=[
        NotNull("person_id"),
        NotNull("AGEP"),
        Range("AGEP", minimum=0, maximum=120),
        NotNull("SCHL"),
        Allowed("SEX", values=["1", "2"]),
    ],
    owner=OWNER,
    purposes=[PURPOSE],
    region="us",
    retention=timedelta(days=3650),
    subject_key="person_id",
)

cohort = FeatureView(
    "cohort",
    entities=[cohort_entity],
    source=FileSource(
        "data/census/cohort_*.parquet",
        event_timestamp="month_end",
        created_timestamp="published_at",
    ),
    ttl=timedelta(days=100),
    schema=[
        Field(
            "employment_rate", "float64", description="share employed among earlier outcomes, trailing year"
        ),
        Field("outcomes", "int64", description="how many outcomes the rate rests on"),
    ],
    checks=[
        Allowed("age_band", values=list(AGE_BANDS)),
        Allowed("schooling", values=list(SCHOOLING_BANDS)),
        NotNull("employment_rate"),
        Range("employment_rate", minimum=0, maximum=1),
        Range("outcomes", minimum=1),
    ],
    owner=OWNER,
    purposes=[PURPOSE],
    region="us",
)

employment = FeatureService("employment", views=[person, cohort])
