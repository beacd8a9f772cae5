use super::{HEADER, read};

/// How a stream ends that has this after its header.
fn condition(content: &[u8]) -> &'static str {
    raw_condition(&[HEADER.as_bytes(), content].concat())
}

fn raw_condition(stream: &[u8]) -> &'static str {
    let conditions: Vec<_> = [1, 1448, usize::MAX]
        .iter()
        .map(|length| read(stream, &[*length]).error.map_or("none", |error| error.condition()))
        .collect();
    assert!(
        conditions.iter().all(|condition| *condition == conditions[0]),
        "{conditions:?}"
    );
    conditions[0]
}

/// Inputs that some parsers let through and the servers' do not, or that only an attacker sends: each ends the stream,
/// with the error that RFC 6120 §4.9.3 has for it.
#[test]
fn hostile_elements_end_the_stream() {
    let table: &[(&[u8], &str)] = &[
        // Characters.
        (b"<a>\x01</a>", "not-well-formed"),
        (b"<a>\0</a>", "not-well-formed"),
        (b"<a b='\x1f'/>", "not-well-formed"),
        (b"<a>\xef\xbf\xbf</a>", "not-well-formed"),
        (b"<a>&#xFFFF;</a>", "not-well-formed"),
        (b"<a>&#0;</a>", "not-well-formed"),
        (b"<a>&#xD800;</a>", "not-well-formed"),
        (b"<a>\xff</a>", "unsupported-encoding"),
        (b"<a>\xc0\x80</a>", "unsupported-encoding"),
        (b"<a>\xed\xa0\x80</a>", "unsupported-encoding"),
        (b"<a b='\xf4\x90\x80\x80'/>", "unsupported-encoding"),
        (b"<a>\xe2\x82</a>", "unsupported-encoding"),
        // Markup.
        (b"<a b='<'/>", "not-well-formed"),
        (b"<a>]]></a>", "not-well-formed"),
        (b"<a b='1'c='2'/>", "not-well-formed"),
        (b"<a b=1/>", "not-well-formed"),
        (b"<a b/>", "not-well-formed"),
        (b"<a>a & b</a>", "not-well-formed"),
        (b"<a>&;</a>", "not-well-formed"),
        (b"<a></b>", "not-well-formed"),
        (b"<a></a b='c'>", "not-well-formed"),
        (b"< a/>", "not-well-formed"),
        (b"<a/ >", "not-well-formed"),
        (b"<a b='1' b='1'/>", "not-well-formed"),
        // Names.
        (b"<1a/>", "not-well-formed"),
        (b"<a 1a='x'/>", "not-well-formed"),
        (b"<mess=age/>", "not-well-formed"),
        (b"<a:b:c xmlns:a='x'/>", "not-well-formed"),
        (b"<:a/>", "not-well-formed"),
        (b"<a:/>", "not-well-formed"),
        (b"<\xf0\x90\x80\x80/>", "not-well-formed"),
        // Namespaces.
        (b"<p:a/>", "not-well-formed"),
        (b"<a p:b=''/>", "not-well-formed"),
        (b"<a><b xmlns:p='x'/><p:c/></a>", "not-well-formed"),
        (b"<a xmlns:p='x' xmlns:q='x' p:b='' q:b=''/>", "not-well-formed"),
        (b"<a xmlns:p=''/>", "not-well-formed"),
        (b"<a xmlns='x' xmlns='x'/>", "not-well-formed"),
        (b"<a xmlns:p='x' xmlns:p='y'/>", "not-well-formed"),
        (b"<a xmlns:xml='x'/>", "not-well-formed"),
        (
            b"<a xmlns:p='http://www.w3.org/XML/1998/namespace'/>",
            "not-well-formed",
        ),
        (b"<a xmlns:xmlns='x'/>", "not-well-formed"),
        (b"<a xmlns='http://www.w3.org/2000/xmlns/'/>", "not-well-formed"),
        (b"<a xmlns:p='http://www.w3.org/2000/xmlns/'/>", "not-well-formed"),
        (b"<xmlns:a/>", "not-well-formed"),
        // RFC 6120 §11.1
        (b"<a>&x;</a>", "restricted-xml"),
        (b"<a b='&nbsp;'/>", "restricted-xml"),
        (b"<!DOCTYPE a>", "restricted-xml"),
        (b"<a><!ENTITY x 'y'></a>", "restricted-xml"),
        (b"<!-- x -->", "restricted-xml"),
        (b"<a><!-- x --></a>", "restricted-xml"),
        (b"<?x y?>", "restricted-xml"),
        (b"<a><?x y?></a>", "restricted-xml"),
        (b"<?xml version='1.0'?>", "restricted-xml"),
        // Between elements.
        (b"text", "bad-format"),
        (b"<![CDATA[ ]]>", "bad-format"),
        (b"</stream:streams>", "not-well-formed"),
        (b"<s:message xmlns:s='jabber:server'/>", "bad-namespace-prefix"),
    ];
    for (content, expected) in table {
        assert_eq!(condition(content), *expected, "{}", content.escape_ascii());
    }
}

/// The same before the first element.
#[test]
fn hostile_beginnings_end_the_stream() {
    let rest = &HEADER[HEADER.find("?>").unwrap() + 2..];
    let table = [
        ("<?xml version='1.0' encoding='utf-16'?>", "unsupported-encoding"),
        ("<?xml version='1.0' encoding='iso-8859-1'?>", "unsupported-encoding"),
        ("<?xml version='1.0' encoding='UTF-8'?>", "none"),
        ("<?xml version=\"1.0\" ?>\r\n", "none"),
        (" \n", "none"),
        ("<?xml version='1.1'?>", "restricted-xml"),
        ("<?xml?>", "not-well-formed"),
        ("<?xml version='1.0'?><?xml version='1.0'?>", "restricted-xml"),
        (" <?xml version='1.0'?>", "not-well-formed"),
        (
            "<!DOCTYPE s [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]>",
            "restricted-xml",
        ),
        (
            "<?xml version='1.0'?><!DOCTYPE s SYSTEM 'file:///etc/passwd'>",
            "restricted-xml",
        ),
        ("<!-- x -->", "restricted-xml"),
        ("<?x y?>", "restricted-xml"),
        ("x", "not-well-formed"),
        ("\u{feff}", "not-well-formed"),
        ("</stream:stream>", "not-well-formed"),
    ];
    for (beginning, expected) in table {
        assert_eq!(
            raw_condition(format!("{beginning}{rest}").as_bytes()),
            expected,
            "{beginning}"
        );
    }
    let utf16: Vec<u8> = HEADER.encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(raw_condition(&utf16), "not-well-formed");
}

/// What would cost a parser much time or memory is refused at the limit.
#[test]
fn floods_end_the_stream() {
    let many = |piece: &str, count: usize| piece.repeat(count).into_bytes();
    let numbered = |before: &str, after: &str| {
        let attributes: String = (0..100_000).map(|n| format!(" {before}{n}='{after}'")).collect();
        format!("<a{attributes}/>").into_bytes()
    };
    for flood in [
        many("<a>", 100_000),
        numbered("a", ""),
        numbered("xmlns:a", "x"),
        [b"<a>".to_vec(), many("x", 10_000_000)].concat(),
        [b"<a b='".to_vec(), many("x", 10_000_000)].concat(),
        [b"<".to_vec(), many("a", 1_000_000)].concat(),
        [b"<a ".to_vec(), many(" ", 1_000_000)].concat(),
        [b"<a>".to_vec(), many("<b/>", 30_000)].concat(),
        [b"<a>".to_vec(), many("&amp;", 200_000)].concat(),
    ] {
        let reading = read(&[HEADER.as_bytes(), &flood].concat(), &[1448]);
        let condition = reading.error.map(|error| error.condition());
        assert_eq!(condition, Some("policy-violation"), "{}", flood[..20].escape_ascii());
        assert!(reading.used < 524_288 + 2_000);
    }
    let header = many("x", 1_000_000);
    assert_eq!(raw_condition(&[b"<a b='", &header[..]].concat()), "policy-violation");
}
