//! The words of SQL that are no names unless they are quoted.
//!
//! The trap: which words those are differs from version to version, and a word too few is a statement that fails, or that
//! means another thing: `user` in a list of columns is not the column of that name, but who is asking. A word too many is
//! two quotation marks. So this is the list of the newest version, which only ever grew.

/// The key words of PostgreSQL 18 that are reserved, or stand for themselves where a column, a function or a type does:
/// all but those that its documentation, appendix C, lists as non-reserved. Sorted.
#[rustfmt::skip]
const QUOTED: [&str; 164] = [
    "all", "analyse", "analyze", "and", "any", "array", "as", "asc", "asymmetric", "authorization", "between",
    "bigint", "binary", "bit", "boolean", "both", "case", "cast", "char", "character", "check", "coalesce", "collate",
    "collation", "column", "concurrently", "constraint", "create", "cross", "current_catalog", "current_date",
    "current_role", "current_schema", "current_time", "current_timestamp", "current_user", "dec", "decimal",
    "default", "deferrable", "desc", "distinct", "do", "else", "end", "except", "exists", "extract", "false", "fetch",
    "float", "for", "foreign", "freeze", "from", "full", "grant", "greatest", "group", "grouping", "having", "ilike",
    "in", "initially", "inner", "inout", "int", "integer", "intersect", "interval", "into", "is", "isnull", "join",
    "json", "json_array", "json_arrayagg", "json_exists", "json_object", "json_objectagg", "json_query",
    "json_scalar", "json_serialize", "json_table", "json_value", "lateral", "leading", "least", "left", "like",
    "limit", "localtime", "localtimestamp", "merge_action", "national", "natural", "nchar", "none", "normalize",
    "not", "notnull", "null", "nullif", "numeric", "offset", "on", "only", "or", "order", "out", "outer", "overlaps",
    "overlay", "placing", "position", "precision", "primary", "real", "references", "returning", "right", "row",
    "select", "session_user", "setof", "similar", "smallint", "some", "substring", "symmetric", "system_user",
    "table", "tablesample", "then", "time", "timestamp", "to", "trailing", "treat", "trim", "true", "union", "unique",
    "user", "using", "values", "varchar", "variadic", "verbose", "when", "where", "window", "with", "xmlattributes",
    "xmlconcat", "xmlelement", "xmlexists", "xmlforest", "xmlnamespaces", "xmlparse", "xmlpi", "xmlroot",
    "xmlserialize", "xmltable",
];

/// Whether the word, in lower case, means itself when it is quoted, and something else or nothing when it is not.
pub(super) fn needs_quotes(word: &str) -> bool {
    QUOTED.binary_search(&word).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_found_by_halving() {
        assert!(QUOTED.is_sorted() && QUOTED.iter().all(|word| needs_quotes(word)));
        assert!(!needs_quotes("outbox") && !needs_quotes("name") && !needs_quotes(""));
    }
}
