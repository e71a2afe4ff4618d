//go:build linux

package cli

import (
	"errors"
	"fmt"
	"math"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// JSON is written and read here and not by encoding/json, which would make a guest's
// initramfs larger by a tenth.

// object is a JSON object whose members have an order.
type object []member

type member struct {
	key   string
	value any
}

// appendJSON appends a value of those that CBOR decoding gives, or an object.
func appendJSON(b []byte, v any) []byte {
	switch v := v.(type) {
	case nil:
		return append(b, "null"...)
	case bool:
		return strconv.AppendBool(b, v)
	case int:
		return strconv.AppendInt(b, int64(v), 10)
	case int64:
		return strconv.AppendInt(b, v, 10)
	case uint32:
		return strconv.AppendUint(b, uint64(v), 10)
	case uint64:
		return strconv.AppendUint(b, v, 10)
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return append(b, "null"...)
		}
		return strconv.AppendFloat(b, v, 'g', -1, 64)
	case string:
		return appendString(b, v)
	case []byte:
		return appendString(b, string(v))
	case []string:
		b = append(b, '[')
		for i, e := range v {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendString(b, e)
		}
		return append(b, ']')
	case []any:
		b = append(b, '[')
		for i, e := range v {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendJSON(b, e)
		}
		return append(b, ']')
	case object:
		b = append(b, '{')
		for i, m := range v {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendString(b, m.key)
			b = append(b, ':')
			b = appendJSON(b, m.value)
		}
		return append(b, '}')
	case map[any]any:
		o := make(object, 0, len(v))
		for k, e := range v {
			key, ok := k.(string)
			if !ok {
				key = fmt.Sprint(k)
			}
			o = append(o, member{key, e})
		}
		sort.Slice(o, func(i, j int) bool { return o[i].key < o[j].key })
		return appendJSON(b, o)
	}
	return appendString(b, fmt.Sprint(v))
}

// appendString appends a string; bytes that are no UTF-8 become U+FFFD.
func appendString(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r == '\n':
			b = append(b, '\\', 'n')
		case r < ' ' || r == 0x7f:
			b = append(b, '\\', 'u', '0', '0', hex[r>>4], hex[r&15])
		default:
			b = utf8.AppendRune(b, r)
		}
	}
	return append(b, '"')
}

// cborJSON makes JSON of a CBOR item: keys become text.
func cborJSON(raw proto.RawMessage) string {
	if len(raw) == 0 {
		return "null"
	}
	var v any
	if err := proto.Unmarshal(raw, &v); err != nil {
		return "null"
	}
	return string(appendJSON(nil, v))
}

var errJSON = errors.New("not JSON")

// jsonCBOR makes CBOR of a JSON value: keys that are decimal numbers become
// numbers, as port A's records have them.
func jsonCBOR(s string) (proto.RawMessage, error) {
	p := &parser{s: s}
	v, err := p.value(0)
	if err == nil {
		if p.space(); p.i != len(s) {
			err = p.bad("something follows the value")
		}
	}
	if err != nil {
		return nil, err
	}
	return proto.Marshal(v)
}

// parser reads JSON (RFC 8259).
type parser struct {
	s string
	i int
}

func (p *parser) bad(why string) error {
	return fmt.Errorf("%w: %s at byte %d", errJSON, why, p.i)
}

func (p *parser) space() {
	for p.i < len(p.s) && strings.IndexByte(" \t\r\n", p.s[p.i]) >= 0 {
		p.i++
	}
}

// is skips c if it is next.
func (p *parser) is(c byte) bool {
	p.space()
	if p.i < len(p.s) && p.s[p.i] == c {
		p.i++
		return true
	}
	return false
}

func (p *parser) value(depth int) (any, error) {
	if depth > 12 {
		return nil, p.bad("too deep")
	}
	p.space()
	for word, v := range map[string]any{"null": nil, "true": true, "false": false} {
		if strings.HasPrefix(p.s[p.i:], word) {
			p.i += len(word)
			return v, nil
		}
	}
	switch {
	case p.i == len(p.s):
		return nil, p.bad("a value is missing")
	case p.s[p.i] == '"':
		return p.text()
	case p.is('['):
		list := []any{}
		if p.is(']') {
			return list, nil
		}
		for {
			v, err := p.value(depth + 1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
			if p.is(']') {
				return list, nil
			}
			if !p.is(',') {
				return nil, p.bad("neither , nor ]")
			}
		}
	case p.is('{'):
		m := map[any]any{}
		if p.is('}') {
			return m, nil
		}
		for {
			p.space()
			k, err := p.text()
			if err != nil {
				return nil, err
			}
			if !p.is(':') {
				return nil, p.bad("no :")
			}
			v, err := p.value(depth + 1)
			if err != nil {
				return nil, err
			}
			if n, err := strconv.ParseUint(k, 10, 63); err == nil && strconv.FormatUint(n, 10) == k {
				m[n] = v
			} else {
				m[k] = v
			}
			if p.is('}') {
				return m, nil
			}
			if !p.is(',') {
				return nil, p.bad("neither , nor }")
			}
		}
	}
	return p.number()
}

func (p *parser) number() (any, error) {
	start := p.i
	for p.i < len(p.s) && strings.IndexByte("+-0123456789.eE", p.s[p.i]) >= 0 {
		p.i++
	}
	s := p.s[start:p.i]
	if n := strings.TrimPrefix(s, "-"); n == "" || n[0] < '0' || n[0] > '9' || len(n) > 1 && n[0] == '0' && n[1] >= '0' && n[1] <= '9' {
		return nil, p.bad("no value")
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return n, nil
	}
	if n, err := strconv.ParseUint(s, 10, 64); err == nil {
		return n, nil
	}
	for i := range len(s) { // RFC 8259 wants digits on both sides of a point
		if s[i] == '.' && (i+1 == len(s) || s[i+1] < '0' || s[i+1] > '9') {
			return nil, p.bad("no digit behind the point")
		}
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return nil, p.bad("no number")
	}
	return f, nil
}

func (p *parser) text() (string, error) {
	if p.i == len(p.s) || p.s[p.i] != '"' {
		return "", p.bad("no string")
	}
	var b []byte
	for p.i++; p.i < len(p.s); p.i++ {
		switch c := p.s[p.i]; {
		case c == '"':
			p.i++
			return string(b), nil
		case c < ' ':
			return "", p.bad("a control character in a string")
		case c == '\\':
			if p.i++; p.i == len(p.s) {
				return "", p.bad("the string does not end")
			}
			const from, to = `"\/bfnrt`, "\"\\/\b\f\n\r\t"
			if k := strings.IndexByte(from, p.s[p.i]); k >= 0 {
				b = append(b, to[k])
				continue
			}
			if p.s[p.i] != 'u' {
				return "", p.bad("unknown escape")
			}
			r, ok := p.hex(p.i + 1)
			if !ok {
				return "", p.bad("\\u without four digits")
			}
			p.i += 4
			if r >= 0xd800 && r < 0xdc00 && strings.HasPrefix(p.s[p.i+1:], `\u`) {
				if low, ok := p.hex(p.i + 3); ok && low >= 0xdc00 && low < 0xe000 {
					r = (r-0xd800)<<10 + low - 0xdc00 + 0x10000
					p.i += 6
				}
			}
			b = utf8.AppendRune(b, r)
		default:
			b = append(b, c)
		}
	}
	return "", p.bad("the string does not end")
}

func (p *parser) hex(at int) (rune, bool) {
	if at+4 > len(p.s) {
		return 0, false
	}
	n, err := strconv.ParseUint(p.s[at:at+4], 16, 32)
	return rune(n), err == nil && p.s[at] != '+' && p.s[at] != '_'
}
