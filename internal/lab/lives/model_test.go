package lives

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestATokenNamesOneContentOfOneSector(t *testing.T) {
	var b [sector]byte
	for s := range 200 {
		for _, tok := range []token{0, 1, 77, 1 << 30} {
			fill(b[:], s, tok)
			require.Equal(t, tok, name(b[:], s))
			if tok != 0 {
				require.NotEqual(t, tok, name(b[:], s+1), "it lies where it does not belong")
				b[sector-1] ^= 1
				require.Equal(t, torn, name(b[:], s))
			}
		}
	}
}

func TestWhatMayBeReadOfASector(t *testing.T) {
	l := newLine(1, make([]token, 16))
	f := &file{line: l, local: map[int]bool{}}
	l.answered(0, 1)
	require.False(t, l.may(0, 0, false), "what was answered is there")
	f.crashed()
	require.True(t, l.may(0, 0, false), "it was not flushed")
	require.True(t, l.may(0, 1, false))
	require.False(t, l.may(0, 2, false))
	require.True(t, l.may(0, 0, true))
	require.False(t, l.may(0, 1, false), "what was read once stays")
	l.answered(0, 2)
	l.flushed()
	f.crashed()
	require.False(t, l.may(0, 0, false), "it was flushed")
	l.failed(0, 3)
	require.True(t, l.may(0, 2, false))
	require.True(t, l.may(0, 3, true))
	require.False(t, l.may(0, 2, false))
	require.True(t, l.may(15, 99, false), "of the last block nothing is known")
}

func TestOnlyAnOfferMakesAnotherOwner(t *testing.T) {
	a, b := &file{host: &host{}}, &file{host: &host{}}
	l := newLine(1, make([]token, 16))
	a.line, b.line, l.owner = l, l, a
	r := &run{}
	p := &process{label: "p"}
	require.Equal(t, "takeover", kindOf(r.owns(p, &export{file: b})))
	l.offered = true
	require.NoError(t, r.owns(p, &export{file: b}))
	require.Same(t, b, l.owner)
	require.Equal(t, "takeover", kindOf(r.owns(p, &export{file: a})))
}
