"""What known tasks are about: the types that a study averages over."""

from fnmatch import fnmatchcase

TYPES = {
    "sentiment": "sst2* sst5 rotten_tomatoes imdb yelp* amazon* vader* tweeteval_sentiment mr cr "
    "mpqa goemotions_polarity financial_phrasebank *sst2_polarity_classification",
    "emotion": "tweeteval_emotion tweeteval_emoji goemotions emotion dair_emotion",
    "toxicity": "hate* ethos* tweeteval_offensive tweeteval_hate civil_comments toxic*",
    "stance and tone": "tweeteval_stance* tweeteval_irony clickbait subj liar persona_* "
    "logical_fallacy query_wellformedness",
    "topic": "ag_news dbpedia* bbc_news *newsgroups yahoo_answers brown_genre sms_spam",
    "intent": "banking77 clinc150 hwu64* snips* atis* massive*",
    "question type": "trec* mctaco_category",
    "inference": "mnli* qnli rte cb snli anli* scitail sick wnli med_monotonicity monli*",
    "paraphrase": "mrpc qqp paws* stsb sts* ",
    "grammar": "cola blimp_* jfleg*",
    "coreference": "wsc* winogrande gap* winobias* definite_pronoun*",
    "relation": "semeval2010_task8 *relation_extraction",
    "reading": "boolq multirc race* squad* quoref* drop* mctest cosmos_qa pubmedqa sciq "
    "consumer_contracts_qa privacy_policy_qa *quoref* *sciq*",
    "commonsense": "copa piqa codah commonsense_qa hellaswag social_i_qa swag comve* "
    "proverb_of_story *commonsenseqa* ecare* openbookqa",
    "knowledge": "mmlu* medmcqa arc* agieval_* nq_open known_facts lre_* triviaqa web_questions "
    "fv_country_capital fv_national_parks fv_park_country fv_person_* cmudict* ii_larger_animal",
    "reasoning": "bbh_* logiqa* *outcome_extraction",
    "arithmetic": "gsm8k* mawps asdiv* svamp aqua* ii_sum ii_diff",
    "bias": "bbq_* stereoset crows*",
    "words": "fv_* ii_*",
    "summary": "xsum cnn_dailymail samsum* dialogsum* gigaword *samsum*",
    "writing": "e2e_nlg webnlg common_gen onestop* dart ni_task*",
}
"""Type -> patterns of names, tried in this order."""
OTHER = "other"


def type_of(name: str) -> str:
    """The type of a task by its name, or `other`.

    Example:
        >>> type_of("mnli"), type_of("hf:glue:sst2"), type_of("my_task")
        ('inference', 'sentiment', 'other')
    """
    name = name.rsplit(":", 1)[-1].rsplit("/", 1)[-1].lower().replace("-", "_")
    found = (
        known
        for known, patterns in TYPES.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns.split())
    )
    return next(found, OTHER)
