package attach

import (
	"encoding/binary"
	"encoding/hex"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// littleEndian leaves the test out where the recorded bytes would be others.
func littleEndian(t *testing.T) {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the expected bytes are those of a little-endian machine")
	}
}

func TestConnectIsTheMessageThatTheKernelWants(t *testing.T) {
	littleEndian(t)
	a := attrs(nil).u32(attrIndex, 3).u64(attrSize, 1<<20).text(attrBackend, "ab").sockets([]int{7, 9})
	require.Equal(t, ""+
		"08000100"+"03000000"+ // NBD_ATTR_INDEX
		"0c000200"+"0000100000000000"+ // NBD_ATTR_SIZE_BYTES
		"07000a00"+"61620000"+ // NBD_ATTR_BACKEND_IDENTIFIER, and a byte to fill up
		"1c000780"+ // NBD_ATTR_SOCKETS, nested
		"0c000180"+"08000100"+"07000000"+ // NBD_SOCK_ITEM with NBD_SOCK_FD
		"0c000180"+"08000100"+"09000000", hex.EncodeToString(a))
	require.Equal(t, "1c000000"+"2300"+"0500"+"02000000"+"00000000"+"01010000"+"08000100"+"03000000",
		hex.EncodeToString(message(0x23, 2, cmdConnect, nbdVersion, attrs(nil).u32(attrIndex, 3))))
}

func TestAttributesAreFoundAndCutOnesAreNot(t *testing.T) {
	a := attrs(nil).bytes(4, []byte{1, 2, 3}).nested(7, attrs(nil).u32(1, 5)).u32(attrIndex, 9)
	v, ok := attr(a, attrIndex)
	require.True(t, ok)
	require.EqualValues(t, 9, binary.NativeEndian.Uint32(v))
	v, ok = attr(a, 7)
	require.True(t, ok, "a nested one, under its type without the flag")
	require.Equal(t, []byte(attrs(nil).u32(1, 5)), v)
	_, ok = attr(a, 2)
	require.False(t, ok)
	for n := range a {
		_, ok := attr(a[:n], attrIndex)
		require.False(t, ok, "of %d bytes only %d", len(a), n)
	}
	_, ok = attr([]byte{0, 0, 1, 0, 1, 0, 0, 0}, 1)
	require.False(t, ok, "an attribute of length 0 would never end")
}

// said is a message of the kernel.
func said(typ uint16, seq uint32, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	return append(b, body...)
}

func errorBody(errno int32) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(-errno)) }

func TestAnswerIsTheReplyToThisRequest(t *testing.T) {
	reply := said(0x23, 5, append([]byte{1, 1, 0, 0}, attrs(nil).u32(attrIndex, 4)...))
	done := said(unix.NLMSG_ERROR, 5, errorBody(0))

	a, over, err := answer(append(append([]byte(nil), reply...), done...), 5)
	require.NoError(t, err)
	require.True(t, over)
	require.Equal(t, []byte(attrs(nil).u32(attrIndex, 4)), a)

	a, over, err = answer(reply, 5)
	require.NoError(t, err)
	require.False(t, over, "the acknowledgement is still to come")
	require.NotEmpty(t, a)

	_, over, err = answer(said(unix.NLMSG_ERROR, 5, errorBody(int32(unix.EBUSY))), 5)
	require.True(t, over)
	require.ErrorIs(t, err, unix.EBUSY)

	a, over, err = answer(append(append([]byte(nil), reply...), done...), 6)
	require.NoError(t, err)
	require.False(t, over, "an answer to somebody else's question")
	require.Empty(t, a)

	for n := 1; n < len(reply); n++ {
		_, _, err := answer(reply[:n], 5)
		require.Error(t, err, "of %d bytes only %d", len(reply), n)
	}
}
